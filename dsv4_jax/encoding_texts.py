"""Hold the control tokens and fixed texts of DeepSeek-V4's prompt format, byte for byte.

They are constants of `encoding/encoding_dsv4.py` in the model repository
`deepseek-ai/DeepSeek-V4-Flash` at revision 60d8d70770c6 (MIT License, Copyright (c) 2023 DeepSeek).
"""

from __future__ import annotations

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
LATEST_REMINDER = "<｜latest_reminder｜>"
THINK, END_THINK = "<think>", "</think>"
DSML = "｜DSML｜"  # opens the names of all tags around tool calls
TASKS = {
    task: f"<｜{task}｜>"
    for task in ("action", "query", "authority", "domain", "title", "read_url")
}
CHAT_TOKENS = (USER, ASSISTANT, LATEST_REMINDER, THINK, END_THINK, DSML, *TASKS.values())
CONTROL_TOKENS = (BOS, EOS, *CHAT_TOKENS)

# How V4 thinks before it answers: the mode of its prompt, and the effort.
THINKING = {"off": ("chat", None), "high": ("thinking", "high"), "max": ("thinking", "max")}

MAX_EFFORT = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to "
    "resolve the root cause, rigorously stress-testing your logic against all potential paths, "
    "edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, "
    "considered alternative, and rejected hypothesis to ensure absolutely no assumption is left "
    "unchecked.\n\n"
)
RESPONSE_FORMAT = (
    "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
)
BEFORE_TOOLS = f"""## Tools

You have access to a set of tools to help answer the user's question. \
You can invoke tools by writing a "<{DSML}tool_calls>" block like the following:

<{DSML}tool_calls>
<{DSML}invoke name="$TOOL_NAME">
<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>
...
</{DSML}invoke>
<{DSML}invoke name="$TOOL_NAME2">
...
</{DSML}invoke>
</{DSML}tool_calls>

String parameters should be specified as is and set `string="true"`. \
For all other types (numbers, booleans, arrays, objects), \
pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by {THINK}), \
you MUST output your complete reasoning inside {THINK}...{END_THINK} \
BEFORE any tool calls or final response.

Otherwise, output directly after {END_THINK} with tool calls or final response.

### Available Tool Schemas

"""
AFTER_TOOLS = """

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""
