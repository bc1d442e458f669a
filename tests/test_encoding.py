"""The chat format is DeepSeek-V4's: official vectors byte for byte, and every rule by hand.

`data/encoding/` holds two vectors and the text of maximal effort as `deepseek-ai/DeepSeek-V4-Flash`
publishes them (MIT License), the vectors in `encoding/tests/`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dsv4_jax.encoding import encode_messages, parse_completion, render_messages
from dsv4_jax.encoding_texts import CONTROL_TOKENS, MAX_EFFORT
from dsv4_jax.errors import InputError

DATA = Path(__file__).parent / "data" / "encoding"
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT, REMINDER = "<｜User｜>", "<｜Assistant｜>", "<｜latest_reminder｜>"
CALLS, CALLS_END = "\n\n<｜DSML｜tool_calls>\n", "</｜DSML｜tool_calls>"
TOOLS_BEGIN = "\n\n## Tools\n\nYou have access"
TOOLS_END = (
    "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke tool "
    "calls.\n"
)
FORMAT = "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"


def user(content: str, **fields) -> dict:
    return {"role": "user", "content": content, **fields}


def system(content: str, **fields) -> dict:
    return {"role": "system", "content": content, **fields}


def developer(content: str, **fields) -> dict:
    return {"role": "developer", "content": content, **fields}


def assistant(content: str | None, reasoning: str | None = None, **fields) -> dict:
    return {"role": "assistant", "content": content, "reasoning_content": reasoning, **fields}


def reminder(content: str, **fields) -> dict:
    return {"role": "latest_reminder", "content": content, **fields}


def result(content: object, call_id: str = "") -> dict:
    return {"role": "tool", "content": content, "tool_call_id": call_id}


def call(name: str, arguments: str = "{}", call_id: str | None = None) -> dict:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def tool(**function) -> dict:
    return {"type": "function", "function": function}


def invoked(name: str, *parameters: str) -> str:
    return f'<｜DSML｜invoke name="{name}">\n' + "\n".join(parameters) + "\n</｜DSML｜invoke>\n"


def parameter(name: str, value: str, is_string: str) -> str:
    return f'<｜DSML｜parameter name="{name}" string="{is_string}">{value}</｜DSML｜parameter>'


def chat(*messages: dict, **options) -> str:
    """Return a prompt in mode `chat` without its BOS."""
    return encode_messages(messages, thinking_mode="chat", add_bos=False, **options)


def think(*messages: dict, **options) -> str:
    """Return a prompt in mode `thinking` without its BOS."""
    return encode_messages(messages, thinking_mode="thinking", add_bos=False, **options)


def vector(number: int) -> tuple[list[dict], str]:
    messages = json.loads((DATA / f"input_{number}.json").read_text("utf-8"))
    if isinstance(messages, dict):
        messages["messages"][0]["tools"] = messages["tools"]
        messages = messages["messages"]
    return messages, (DATA / f"output_{number}.txt").read_bytes().decode()


# Rendering


@pytest.mark.parametrize("number", (1, 2))
def test_official_vectors(number):
    messages, expected = vector(number)
    before = json.dumps(messages)
    assert encode_messages(messages, thinking_mode="thinking") == expected
    assert json.dumps(messages) == before, "the caller's messages were changed"


def test_modes_and_effort():
    question = [user("Hi")]
    assert (DATA / "effort_max.txt").read_bytes().decode() == MAX_EFFORT
    assert encode_messages([], thinking_mode="chat") == BOS
    begin = BOS + USER + "Hi" + ASSISTANT
    for effort in (None, "high", "max"):
        chatting = encode_messages(question, thinking_mode="chat", reasoning_effort=effort)
        assert chatting == begin + "</think>"
    for effort in (None, "high"):
        thinking = encode_messages(question, thinking_mode="thinking", reasoning_effort=effort)
        assert thinking == begin + "<think>"
    most = encode_messages(question, thinking_mode="thinking", reasoning_effort="max")
    assert most == BOS + MAX_EFFORT + USER + "Hi" + ASSISTANT + "<think>"
    messages = [system("Be brief."), *question]
    most = encode_messages(messages, thinking_mode="thinking", reasoning_effort="max")
    assert most == BOS + MAX_EFFORT + "Be brief." + USER + "Hi" + ASSISTANT + "<think>"


def test_a_reply_without_reasoning_still_ends_its_thinking():
    assert think(user("Q"), assistant("A")) == f"{USER}Q{ASSISTANT}<think></think>A{EOS}"
    assert chat(user("Q"), assistant("A", "R")) == f"{USER}Q{ASSISTANT}</think>A{EOS}"
    assert think(user("Q"), {"role": "assistant"}) == f"{USER}Q{ASSISTANT}<think></think>{EOS}"
    assert think(assistant("A", "R")) == f"R</think>A{EOS}"


def test_a_reply_may_be_left_open():
    assert think(user("Q"), assistant("A", "R", wo_eos=True)).endswith("<think>R</think>A")
    assert think(user("Q"), assistant("A", "R", wo_eos=False)).endswith("<think>R</think>A" + EOS)


def test_system_messages():
    assert chat(system("S"), user("Q")) == f"S{USER}Q{ASSISTANT}</think>"
    assert chat({"role": "system"}, user("Q")) == f"{USER}Q{ASSISTANT}</think>"
    # Nothing makes the model answer where no user asked, and nothing stands between turns.
    assert chat(user("Q"), system("S")) == f"{USER}QS"


def test_tools_and_response_format():
    name = {"name": "größe", "parameters": {"a": [1, None, True]}}
    schema = {"type": "json_object", "x": "é"}
    fields = {"tools": [tool(**name), tool(name="other")], "response_format": schema}
    block = chat(system("S", **fields))
    assert block.startswith("S" + TOOLS_BEGIN)
    assert block.endswith(
        "\n\n### Available Tool Schemas\n\n"
        '{"name": "größe", "parameters": {"a": [1, null, true]}}\n'
        '{"name": "other"}' + TOOLS_END + FORMAT + '{"type": "json_object", "x": "é"}'
    )  # fmt: skip
    assert chat(developer("S", **fields)) == USER + block + ASSISTANT + "</think>"
    assert chat({"role": "system", "tools": fields["tools"]}).startswith(TOOLS_BEGIN)
    assert chat(system("S", response_format=[1])) == "S" + FORMAT + "[1]"
    # Elsewhere and when empty they say nothing.
    assert chat(system("S", tools=[], response_format={})) == "S"
    assert chat(assistant("A", **fields)) == "A" + EOS
    assert chat(user("Q", **fields)) == f"{USER}Q{ASSISTANT}</think>"


def test_developer_messages_are_user_turns():
    assert chat(developer("D"), user("Q")) == f"{USER}D{USER}Q{ASSISTANT}</think>"
    assert think(developer("D"), assistant("A", "R")) == f"{USER}D{ASSISTANT}<think>R</think>A{EOS}"


def test_latest_reminders():
    assert chat(reminder("monday")) == REMINDER + "monday"
    assert chat(reminder("monday"), user("Q")) == f"{REMINDER}monday{USER}Q{ASSISTANT}</think>"
    # A reminder after a user message comes behind what opens the answer.
    assert chat(user("Q"), reminder("monday")) == f"{USER}Q{ASSISTANT}</think>{REMINDER}monday"


def test_user_messages_in_a_row_are_one_turn():
    assert chat(user("a"), user("b"), user("c")) == f"{USER}a\n\nb\n\nc{ASSISTANT}</think>"
    assert chat(user("a"), user("b", task="title")) == f"{USER}a\n\nb{ASSISTANT}</think>"
    assert chat(user("a", task="title"), user("b")) == f"{USER}a{USER}b{ASSISTANT}</think>"


def test_tool_results_are_blocks_of_a_user_turn():
    end = ASSISTANT + "</think>"
    assert chat(user("a"), result("r")) == f"{USER}a\n\n<tool_result>r</tool_result>{end}"
    assert chat(result("r"), user("a")) == f"{USER}<tool_result>r</tool_result>\n\na{end}"
    assert chat(user("a", task="title"), result("r")) == (
        f"{USER}a\n\n<tool_result>r</tool_result><｜title｜>"
    )
    alone = f"S{USER}<tool_result>r</tool_result>{end}"
    assert chat(system("S"), {"role": "tool", "content": "r"}) == alone


def test_results_in_parts():
    image = {"type": "image_url", "image_url": {"url": "u"}}
    parts = [{"type": "text", "text": "a"}, image, {"type": "text", "text": ""}]
    rendered = f"{USER}<tool_result>a\n\n[Unsupported image_url]\n\n</tool_result>"
    assert chat(result(parts)).startswith(rendered)
    assert chat(result([])).startswith(f"{USER}<tool_result></tool_result>{ASSISTANT}")


def results_in(prompt: str) -> list[str]:
    return re.findall(r"<tool_result>(.*?)</tool_result>|TEXT", prompt)


def test_results_come_in_the_order_of_the_calls():
    calls = assistant(None, tool_calls=[call("f", call_id=i) for i in ("x", "y", "z")])
    late = [result("of z", "z"), user("TEXT"), result("of x", "x"), result("of y", "y")]
    assert results_in(chat(calls, *late)) == ["of x", "", "of y", "of z"]
    # Unknown ids count as the first call's, and keep their order.
    some = [result(f"of {i}", i) for i in ("y", "?", "x")] + [{"role": "tool", "content": "of no"}]
    assert results_in(chat(calls, *some)) == ["of ?", "of x", "of no", "of y"]
    # The last calls count, wherever they stand, and text alone in between changes nothing.
    again = assistant(None, tool_calls=[call("f", call_id="y"), call("f", call_id="x")])
    late = [result("of x", "x"), result("of y", "y")]
    assert results_in(chat(calls, again, assistant("A"), *late)) == ["of y", "of x"]
    assert results_in(chat(*late, context=[calls, again])) == ["of y", "of x"]
    # Ids may stand in the function; calls without ids order nothing.
    inner = [{"function": {"id": i, "name": "f", "arguments": "{}"}} for i in ("y", "x")]
    assert results_in(chat(assistant("", tool_calls=inner), *late)) == ["of y", "of x"]
    nameless = assistant(None, tool_calls=[call("f"), call("g")])
    assert results_in(chat(again, nameless, *late)) == ["of x", "of y"]
    one_named = assistant(None, tool_calls=[call("f", call_id="x"), call("g")])
    assert results_in(chat(one_named, result("of no"), *late)) == ["of no", "of x", "of y"]


def test_tool_calls():
    arguments = json.dumps({"s": "a\n<b>", "n": 1.0, "l": [1, "é"], "z": None, "": ""})
    made = assistant("A", "R", tool_calls=[call("f", arguments), call("g")])
    expected = CALLS + invoked(
        "f", parameter("s", "a\n<b>", "true"), parameter("n", "1.0", "false"),
        parameter("l", '[1, "é"]', "false"), parameter("z", "null", "false"),
        parameter("", "", "true"),
    ) + '<｜DSML｜invoke name="g">\n\n</｜DSML｜invoke>\n' + CALLS_END  # fmt: skip
    assert think(made) == f"R</think>A{expected}{EOS}"
    assert chat(made) == f"A{expected}{EOS}"
    assert chat(assistant("A", tool_calls=[])) == f"A{EOS}"


@pytest.mark.parametrize("arguments", ("", "not JSON", '{"a": 1', "{'a': 1}", "[" * 100_000))
def test_arguments_that_are_no_json_become_one(arguments):
    made = chat(assistant(None, tool_calls=[call("f", arguments)]))
    assert made == CALLS + invoked("f", parameter("arguments", arguments, "true")) + CALLS_END + EOS


# Dropping


TURNS = [
    system("S"), developer("D"), user("a"), assistant("A", "R"), reminder("m"), result("r"),
    assistant("B", "T"), user("b"), assistant("C", "U"),
]  # fmt: skip


def test_old_reasoning_and_developer_messages_are_dropped():
    dropped = think(*TURNS)
    assert dropped == (
        f"S{USER}a{ASSISTANT}</think>A{EOS}{REMINDER}m{USER}<tool_result>r</tool_result>{ASSISTANT}"
        f"</think>B{EOS}{USER}b{ASSISTANT}<think>U</think>C{EOS}"
    )
    assert think(*TURNS[:-1]) == dropped.removesuffix(f"U</think>C{EOS}")
    kept = (
        f"S{USER}D{USER}a{ASSISTANT}<think>R</think>A{EOS}{REMINDER}m{USER}"
        f"<tool_result>r</tool_result>{ASSISTANT}<think>T</think>B{EOS}"
        f"{USER}b{ASSISTANT}<think>U</think>C{EOS}"
    )
    assert think(*TURNS, drop_thinking=False) == kept


def test_a_developer_message_counts_as_the_last_user_message():
    messages = [user("a"), assistant("A", "R"), developer("D"), assistant("B", "T")]
    assert think(*messages) == (
        f"{USER}a{ASSISTANT}</think>A{EOS}{USER}D{ASSISTANT}<think>T</think>B{EOS}"
    )


def test_mode_chat_drops_no_messages():
    assert chat(*TURNS) == chat(*TURNS, drop_thinking=False)
    assert USER + "D" in chat(*TURNS)


def test_tools_keep_reasoning():
    kept = think(*TURNS, drop_thinking=False)
    for index in (1, 3, 4):  # a developer, an assistant, a reminder; not where it is rendered
        turns = [*TURNS]
        turns[index] = {**turns[index], "tools": [tool(name="f")]}
        with_tools = think(*turns)
        assert "<think>R</think>A" in with_tools and USER + "D" in with_tools
        assert with_tools == kept or index == 1
    # A user turn is made of blocks and carries no tools.
    turns = [*TURNS]
    turns[2] = {**turns[2], "tools": [tool(name="f")]}
    assert think(*turns) == think(*TURNS)


# Tasks


@pytest.mark.parametrize("task", ("query", "authority", "domain", "title", "read_url"))
def test_tasks(task):
    for encode in (chat, think):
        assert encode(user("Q", task=task)) == f"{USER}Q<｜{task}｜>"
        assert encode(user("Q", task=task), assistant("A", "R")) == f"{USER}Q<｜{task}｜>A{EOS}"
        # Only what answers or reminds, or nothing, may follow a task's token.
        assert encode(user("Q", task=task), system("S")) == f"{USER}QS"
        assert encode(user("Q", task=task), reminder("m")) == f"{USER}Q<｜{task}｜>{REMINDER}m"
        assert encode(system("S", task=task)) == f"S<｜{task}｜>"
    assert chat(assistant("A", task=task)) == f"A{EOS}<｜{task}｜>"
    assert think(assistant("A", "R", task=task)) == f"R</think>A{EOS}<｜{task}｜>"


def test_the_action_task_opens_an_answer():
    assert chat(user("Q", task="action")) == f"{USER}Q{ASSISTANT}</think><｜action｜>"
    assert think(user("Q", task="action")) == f"{USER}Q{ASSISTANT}<think><｜action｜>"
    old = think(user("Q", task="action"), assistant("A", "R"), user("P"))
    assert old == f"{USER}Q{ASSISTANT}<think><｜action｜>A{EOS}{USER}P{ASSISTANT}<think>"
    assert chat(system("S", task="action")) == f"S{ASSISTANT}</think><｜action｜>"


def test_only_the_answer_to_a_task_goes_without_thinking():
    messages = [user("Q", task="query"), assistant("A", "R"), assistant("B", "T")]
    assert think(*messages) == f"{USER}Q<｜query｜>A{EOS}T</think>B{EOS}"
    assert think(user("Q", task=None), assistant("A", "R")).endswith("<think>R</think>A" + EOS)


# Context


def test_only_what_follows_the_context_is_rendered():
    whole = encode_messages(TURNS, thinking_mode="chat")
    for split in range(1, len(TURNS)):
        begin = encode_messages(TURNS[:split], thinking_mode="chat")
        rest = encode_messages(TURNS[split:], thinking_mode="chat", context=TURNS[:split])
        assert whole.endswith(rest)
        if split == 2:  # where the developer message is the last, an answer to it is opened
            begin = begin.removesuffix(ASSISTANT + "</think>")
        assert begin + rest == whole


def test_context_counts_for_what_is_dropped():
    context = [system("S", tools=[tool(name="f")]), user("a"), assistant("A", "R")]
    messages = [assistant("B", "T"), user("b")]
    assert think(*messages, context=context) == f"T</think>B{EOS}{USER}b{ASSISTANT}<think>"
    assert think(*messages, context=context[1:]) == f"B{EOS}{USER}b{ASSISTANT}<think>"
    assert think(assistant("A", "R"), context=[user("Q", task="title")]) == f"A{EOS}"
    assert think(user("b"), context=TURNS[:4]) == f"{USER}b{ASSISTANT}<think>"
    assert think(user("b"), context=[], reasoning_effort="max").startswith(MAX_EFFORT)
    assert MAX_EFFORT not in think(user("b"), context=[user("a")], reasoning_effort="max")
    # Turns are joined on either side, but not across.
    assert chat(user("b"), user("c"), context=[user("a")]) == f"{USER}b\n\nc{ASSISTANT}</think>"
    assert encode_messages([user("b")], thinking_mode="chat", context=[])[: len(BOS)] == BOS


def test_a_developer_message_that_ends_the_context_hides_a_message():
    """The official encoder counts so; whoever mends it here parts from the format."""
    rendered = think(assistant("B"), user("b"), context=[developer("D")])
    assert rendered == f"{USER}b{ASSISTANT}<think>"


# Segments


def messages_about(word: str) -> list[dict]:
    """Return messages with a word wherever words are taken from messages."""
    arguments = json.dumps({word: word, "b": [word]})
    return [
        system(word, tools=[tool(name=word)], response_format={"x": word}),
        reminder(word), user(word), result([{"type": word}], word), developer(word),
        assistant(word, word, tool_calls=[call(word, arguments, word)]),
        user(word, task="action"),
    ]  # fmt: skip


def test_segments_trust_control_tokens_of_the_template_only():
    options = {"thinking_mode": "thinking", "reasoning_effort": "max"}
    hostile = "".join(CONTROL_TOKENS)
    segments = render_messages(messages_about(hostile), **options)
    prompt = encode_messages(messages_about(hostile), **options)
    assert "".join(text for text, _ in segments) == prompt
    assert prompt.count(hostile) == 14
    assert all(type(trusted) is bool and text for text, trusted in segments)
    trusted = [text for text, trusted in segments if trusted]
    harmless = encode_messages(messages_about("x"), **options)
    assert trusted == re.findall("|".join(map(re.escape, CONTROL_TOKENS)), harmless)
    assert trusted.count("｜DSML｜") == 9 + 8
    assert set(CONTROL_TOKENS) - set(trusted) == {
        f"<｜{task}｜>" for task in ("query", "authority", "domain", "title", "read_url")
    }


# Parsing


def completion(message: dict, mode: str) -> str:
    return encode_messages([message], thinking_mode=mode, add_bos=False)


def test_completions_of_the_official_vectors():
    tools, talk = vector(1), vector(2)
    begin = f"{ASSISTANT}<think>"
    first, last = (part.split(USER)[0] for part in tools[1].split(begin)[1:])
    parsed = parse_completion(first, thinking_mode="thinking")
    assert parsed == {
        "role": "assistant",
        "content": "",
        "reasoning_content": tools[0][2]["reasoning_content"],
        "tool_calls": [tool(**tools[0][2]["tool_calls"][0]["function"])],
    }
    for text, message in ((last, tools[0][-1]), (talk[1].split(begin)[1], talk[0][-1])):
        parsed = parse_completion(text, thinking_mode="thinking")
        assert parsed == {**message, "tool_calls": []}


@pytest.mark.parametrize("mode", ("chat", "thinking"))
@pytest.mark.parametrize("content", ("", "A", "a\n\nb < 'c' {d} \"e\"\n"))
@pytest.mark.parametrize(
    "arguments",
    (
        (), ("{}",), ('{"a": 1.50, "b": [true, null, {"c": "é"}], "d": -0}', "{}"),
        ('{"s": "x\\n\\n", "t": "</b> \\" \\\\ \\u0000", "": ""}',),
        ('{"a\\" string=\\"b": "\\">\\n", "<": "<"}',),
    ),
)  # fmt: skip
def test_round_trips(mode, content, arguments):
    calls = [call(f'f{index}" >', text) for index, text in enumerate(arguments)]
    message = assistant(content, "R\n" if mode == "thinking" else "", tool_calls=calls)
    parsed = parse_completion(completion(message, mode), thinking_mode=mode)
    assert (parsed["role"], parsed["content"]) == ("assistant", content)
    assert parsed["reasoning_content"] == message["reasoning_content"]
    functions = [made["function"] for made in parsed["tool_calls"]]
    assert [function["name"] for function in functions] == [f'f{i}" >' for i in range(len(calls))]
    assert [json.loads(f["arguments"]) for f in functions] == [json.loads(t) for t in arguments]
    assert completion({**parsed}, mode) == completion(message, mode)


BLOCK = CALLS + invoked("f", parameter("a", "1", "false"), parameter("b", "x", "true")) + CALLS_END


def test_eos_may_be_missing_after_tool_calls():
    parsed = parse_completion("A" + BLOCK + EOS, thinking_mode="chat")
    assert parsed["tool_calls"] == [tool(name="f", arguments='{"a": 1, "b": "x"}')]
    assert parse_completion("A" + BLOCK, thinking_mode="chat") == parsed


def test_what_was_cut_off_is_refused():
    whole = "R</think>A" + BLOCK
    for length in range(len(whole)):
        with pytest.raises(InputError, match="^completion, character") as error:
            parse_completion(whole[:length], thinking_mode="thinking")
        assert "\n" not in str(error.value)


BAD_COMPLETIONS = {
    "no reasoning": ("A" + EOS, "expected </think>"),
    "calls in reasoning": ("R" + BLOCK + "</think>" + EOS, "character 1: expected </think> before"),
    "no EOS": ("</think>A", f"character 8: expected {EOS} or .* got 'A'"),
    "text after EOS": (f"</think>A{EOS}B", "nothing after it, got 'B'"),
    "two EOS": (f"</think>A{EOS}{EOS}", "nothing after it, got '<"),
    "text after calls": (f"</think>{BLOCK} {EOS}", "nothing after it, got ' "),
    "think in reasoning": (f"a<think>b</think>{EOS}", "character 1: expected no control token"),
    "think in content": (f"a</think>b<think>{EOS}", "character 10: expected no control token"),
    "end of think in content": (f"a</think></think>{EOS}", "character 9: expected no control"),
    "BOS in content": (f"</think>{BOS}{EOS}", "character 8: expected no control token"),
    "EOS in reasoning": (f"{EOS}</think>{EOS}", "character 0: expected no control token"),
    "calls without blank line": (f"</think>{BLOCK[1:]}{EOS}", "character 10: expected no control"),
    "second parameter": (
        "</think>" + BLOCK.replace('"b"', '"a"'), "expected no second parameter 'a'",
    ),
    "no kind": ("</think>" + BLOCK.replace(' string="true"', ""), r'expected name=".*got .* name='),
    "unknown kind": ("</think>" + BLOCK.replace("true", "True"), 'expected name="'),
    "no name": ("</think>" + BLOCK.replace(' name="f"', ""), 'expected name="...", >'),
    "no line end": ("</think>" + BLOCK.replace('"f">\n', '"f">'), 'expected name="...", >'),
    "no bracket": ("</think>" + BLOCK.replace("</｜DSML｜p", "/｜DSML｜p"), 'expected name="'),
    "text between": ("</think>" + BLOCK.replace("\n</｜", "x\n</｜"), "a line end before"),
    "no JSON": ("</think>" + BLOCK.replace(">1<", ">1, <"), "the value as JSON, got '1, <"),
    "deep JSON": ("</think>" + BLOCK.replace(">1<", f">{'[' * 99999}<"), "the value as JSON"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "reason"), BAD_COMPLETIONS.values(), ids=BAD_COMPLETIONS)
def test_bad_completions_are_refused(text, reason):
    with pytest.raises(InputError, match=reason) as error:
        parse_completion(text, thinking_mode="thinking")
    assert "\n" not in str(error.value)


def test_completions_must_be_text_in_a_known_mode():
    with pytest.raises(InputError, match=r"completion: expected a string, got \[1\]"):
        parse_completion([1], thinking_mode="chat")
    with pytest.raises(InputError, match="thinking_mode: expected .* got 'fast'"):
        parse_completion("A" + EOS, thinking_mode="fast")


# Bad input


def in_call(**function) -> list[dict]:
    return [user("Q"), assistant("", tool_calls=[{"function": {**function}}])]


BAD_MESSAGES = {
    "not a list": ("hello", r"messages: expected a list, got 'hello'"),
    "one message": (user("Q"), r"messages: expected a list, got \{"),
    "nothing": (None, "messages: expected a list, got nothing"),
    "not an object": ([user("Q"), "x"], r"messages\[1\]: expected an object .* got 'x'"),
    "no role": ([{"content": "x"}], r"messages\[0\].role: expected one of .* got nothing"),
    "unknown role": ([{"role": "bot", "content": ""}], r"messages\[0\].role: .* got 'bot'"),
    "role of no name": ([{"role": ["user"]}], r"messages\[0\].role: .* got \['user'\]"),
    "no content": ([{"role": "user"}], r"messages\[0\].content: expected a string, got nothing"),
    "content of None": ([user(None)], r"messages\[0\].content: .* got nothing"),
    "content in parts": ([user([{"type": "text", "text": "a"}])], r"messages\[0\].content: .* one"),
    "number": ([system(3)], r"messages\[0\].content: expected a string, got 3"),
    "no reminder": ([{"role": "latest_reminder"}], r"messages\[0\].content: .* got nothing"),
    "no result": ([{"role": "tool"}], r"messages\[0\].content: expected a string, got nothing"),
    "result of no text": ([result(5)], r"messages\[0\].content: .* got 5"),
    "empty developer": ([developer("")], r"messages\[0\].content: expected some text, got ''"),
    "part": ([result(["a"])], r"messages\[0\].content\[0\]: expected an object .* got 'a'"),
    "part of no type": ([result([{}])], r"content\[0\].type: expected a string, got nothing"),
    "part of no text": ([result([{"type": "text"}])], r"content\[0\].text: .* got nothing"),
    "call id": ([{"role": "tool", "content": "", "tool_call_id": 1}], r"tool_call_id: .* got 1"),
    "reasoning": ([assistant("A", 5)], r"messages\[0\].reasoning_content: .* got 5"),
    "task": ([user("Q", task="sing")], r"messages\[0\].task: expected one of action.* 'sing'"),
    "task of no name": ([user("Q", task=["title"])], r"messages\[0\].task: .* got \['title'\]"),
    "wo_eos": ([assistant("A", wo_eos="no")], r"wo_eos: expected true or false, got 'no'"),
    "tools": ([system("S", tools="f")], r"messages\[0\].tools: expected a list, got 'f'"),
    "tool": ([system("S", tools=["f"])], r"messages\[0\].tools\[0\]: expected an object"),
    "no function": ([system("S", tools=[{}])], r"tools\[0\].function: .* got nothing"),
    "schema": ([system("S", tools=[tool(a=b"")])], r"tools\[0\].function: .* a JSON form"),
    "format": ([system("S", response_format={1, 2})], r"response_format: .* a JSON form"),
    "calls": ([assistant("", tool_calls={"a": 1})], r"messages\[0\].tool_calls: expected a list"),
    "call": ([assistant("", tool_calls=[1])], r"tool_calls\[0\]: expected an object .* got 1"),
    "call of nothing": ([assistant("", tool_calls=[{}])], r"tool_calls\[0\].function: .* nothing"),
    "call of no name": (in_call(arguments="{}"), r"messages\[1\].tool_calls\[0\].function.name: "),
    "no arguments": (in_call(name="f"), r"tool_calls\[0\].function.arguments: .* got nothing"),
    "dict": (in_call(name="f", arguments={"a": 1}), r"arguments: expected a string, got \{"),
    "list": (in_call(name="f", arguments="[1]"), r"arguments: expected the JSON of an object, got"),
    "null": (in_call(name="f", arguments="null"), r"arguments: expected the JSON of an object"),
    "surrogate": ([user("ab\ud800")], r"messages\[0\].content: .* UTF-8 form, got '\\ud800'"),
    "surrogate in arguments": (in_call(name="f", arguments='{"a": "\\ud800"}'), "UTF-8 form"),
    "surrogate in a name": (in_call(name="f", arguments='{"\\ud800": 1}'), "UTF-8 form"),
    "surrogate in a schema": ([system("S", tools=[tool(a="\ud800")])], "UTF-8 form"),
}  # fmt: skip


@pytest.mark.parametrize(("messages", "reason"), BAD_MESSAGES.values(), ids=BAD_MESSAGES)
def test_bad_messages_are_refused(messages, reason):
    with pytest.raises(InputError, match="^" + reason if "messages" in reason else reason) as error:
        encode_messages(messages, thinking_mode="chat")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    if messages is not None:  # without a context there is none
        with pytest.raises(InputError, match="^context") as error:
            encode_messages([], thinking_mode="chat", context=messages)


@pytest.mark.parametrize(
    ("options", "reason"),
    (
        ({"thinking_mode": "fast"}, "thinking_mode: expected 'chat' or 'thinking', got 'fast'"),
        ({"thinking_mode": None}, "thinking_mode: .* got nothing"),
        ({"thinking_mode": "chat", "reasoning_effort": "low"}, "reasoning_effort: .* got 'low'"),
        ({"thinking_mode": "chat", "reasoning_effort": 3}, "reasoning_effort: .* got 3"),
        ({"thinking_mode": "chat", "context": "abc"}, "context: expected a list, got 'abc'"),
        ({"thinking_mode": "chat", "context": [3]}, r"context\[0\]: expected an object .* got 3"),
    ),
)
def test_bad_options_are_refused(options, reason):
    for function in (encode_messages, render_messages):
        with pytest.raises(InputError, match="^" + reason) as error:
            function([user("Q")], **options)
        assert "\n" not in str(error.value)
