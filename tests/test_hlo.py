"""Compiled programs are read right: short texts whose numbers are worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from dsv4_jax.devices import Chip
from dsv4_jax.hlo.collectives import collectives
from dsv4_jax.hlo.cost import Costs
from dsv4_jax.hlo.groups import groups_of
from dsv4_jax.hlo.loops import runs, unknown_loops
from dsv4_jax.hlo.overlap import Overlap, compute_seconds, overlap, timed_collectives, total
from dsv4_jax.hlo.text import arrays_of, parse_program

# A second is a million operations, a million bytes of memory, a thousand of the fast network or a
# hundred of the slow one.
TPU = Chip("TPU of tests", 1e6, 1e6, 1e9, 1e3, 1e2)
GPU = TPU._replace(kind="NVIDIA of tests")

HEADER = "HloModule jit_f, is_scheduled=true, entry_computation_layout={()->()}, num_partitions=8\n"
ADD = """
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}
"""
ALL = "replica_groups=[1,8]<=[8]"


def program(entry: str, others: str = ""):
    """Return a program whose entry has these lines, and a root."""
    lines = "\n".join(f"  {line.strip()}" for line in entry.strip().splitlines())
    main = f"ENTRY %main (p: f32[]) -> () {{\n{lines}\n  ROOT %end = () tuple()\n}}\n"
    return parse_program(f"{HEADER}{ADD}{others}\n{main}")


def computation(name: str, lines: str) -> str:
    """Return the text of a computation."""
    body = "\n".join(f"  {line.strip()}" for line in lines.strip().splitlines())
    return f"\n%{name} (p: f32[]) -> f32[] {{\n{body}\n}}\n"


def loop(name: str, body: str, trips: int) -> str:
    """Return the text of a condition and a body that counts from 0."""
    return computation(f"{name}_cond", f"""
        %p = (s32[], f32[4]) parameter(0)
        %i = s32[] get-tuple-element(%p), index=0
        %n = s32[] constant({trips})
        ROOT %less = pred[] compare(%i, %n), direction=LT
    """) + computation(f"{name}_body", f"""
        %p = (s32[], f32[4]) parameter(0)
        %i = s32[] get-tuple-element(%p), index=0
        %v = f32[4] get-tuple-element(%p), index=1
        %one = s32[] constant(1)
        %next = s32[] add(%i, %one)
        {body}
        ROOT %out = (s32[], f32[4]) tuple(%next, %v)
    """)


START = """
    %zero = s32[] constant(0)
    %v = f32[4] parameter(0)
    %initial = (s32[], f32[4]) tuple(%zero, %v)
"""


@pytest.mark.parametrize("text, sizes, spaces", [
    ("f32[2,3]{1,0}", [24], [0]),
    ("bf16[1,512,8192]{2,1,0:T(8,128)(2,1)S(1)}", [2 * 512 * 8192], [1]),
    ("s4[8]{0:T(8,128)E(4)}", [4], [0]),
    ("f8e4m3fn[4]", [4], [0]),
    ("f4e2m1fn[4]", [2], [0]),
    ("pred[]{:T(512)S(6)}", [1], [6]),
    ("s32[<=5]{0}", [20], [0]),
    ("((bf16[8]{0:T(8,128)}, /*index=1*/token[]), c64[2], u32[]{:S(2)})", [16, 0, 16, 4],
     [0, 0, 0, 2]),
    ("()", [], []),
])
def test_arrays(text, sizes, spaces):
    arrays = arrays_of(text)
    assert [x.bytes for x in arrays] == sizes and [x.space for x in arrays] == spaces


def test_instructions():
    found = program("""
        %a = (f32[2]{0:T(8,128)}, f32[]) custom-call(), custom_call_target="(odd)"
        %b.1 = f32[2]{0:T(8,128)S(1)} get-tuple-element((f32[2]{0:T(8,128)}, f32[]) %a), index=0
        %c-d = f32[2]{0} add(%b.1, /*index=1*/%b.1), metadata={op_name="jit(f)/experts/add" id=3}
    """)
    main = found.computations[found.entry]
    assert found.devices == 8
    assert [x.name for x in main.instructions] == ["a", "b.1", "c-d", "end"]
    assert [x.operands for x in main.instructions] == [(), ("a",), ("b.1", "b.1"), ()]
    assert main.by_name["b.1"].attribute("index") == "0"
    assert main.by_name["c-d"].op_name == "jit(f)/experts/add"
    assert main.users["b.1"] == [main.by_name["c-d"]]
    assert main.root.name == "end"


@pytest.mark.parametrize("text", ["", "HloModule f\n\nENTRY %f () -> () {\n}", "module @jit_f {}"])
def test_what_is_no_compiled_program_is_refused(text):
    with pytest.raises(ValueError, match="expected the text of a compiled program"):
        parse_program(text)


@pytest.mark.parametrize("text, groups", [
    ("replica_groups={{0,1,2,3},{4,5,6,7}}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("replica_groups={}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ("replica_groups=[4,2]<=[8], dimensions={0}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
    ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={1}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", [[0, 1, 4, 5], [2, 3, 6, 7]]),
    ("replica_groups=mesh['x'=2,'y'=4] {'x'}, dim", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("replica_groups=mesh['x'=2,'y'=4] {'y'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("replica_groups=mesh['x'=2,'y'=2,'z'=2] {'x','z'}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
    ("replica_groups=mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'y'}",
     [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("replica_groups=mesh['x'=8] {'x':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ("replica_groups=mesh['x'=8] {'x':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("source_target_pairs={{0,1},{1,2}}", [[0, 1], [1, 2]]),
    ("replica_groups={{0,1,2},{3}}", [[0, 1, 2], [3, 3, 3]]),
])
def test_groups(text, groups):
    found = program(f"%a = f32[] all-reduce(), channel_id=1, {text}, to_apply=%add")
    np.testing.assert_array_equal(
        groups_of(found, found.computations["main"].by_name["a"]), np.array(groups)
    )


def test_loops_in_loops_multiply():
    inner = loop("inner", "", 3)
    outer = loop("outer", """
        %again = (s32[], f32[4]) while(%p), condition=%inner_cond, body=%inner_body
    """, 5)
    known = 'backend_config={"known_trip_count":{"n":"7"}}'
    found = program(START + f"""
        %w = (s32[], f32[4]) while(%initial), condition=%outer_cond, body=%outer_body
        %k = (s32[], f32[4]) while(%initial), condition=%inner_cond, body=%inner_body, {known}
    """, inner + outer)
    times = runs(found)
    assert times["outer_body"] == 5 and times["inner_body"] == 5 * 3 + 7
    assert unknown_loops(found) == []


@pytest.mark.parametrize("initial, bound, direction, step, trips", [
    (0, 8, "LT", "add(%i, %by)", 4),  # by is 2
    (0, 7, "LT", "add(%by, %i)", 4),
    (3, 8, "LT", "add(%i, %by)", 3),
    (0, 8, "LE", "add(%i, %by)", 5),
    (8, 0, "GT", "subtract(%i, %by)", 4),
    (8, 0, "GE", "subtract(%i, %by)", 5),
    (0, 8, "NE", "add(%i, %by)", 4),
    (0, 8, "LT", "fusion(%i), kind=kLoop, calls=%twice", 2),
    (9, 8, "LT", "add(%i, %by)", 0),
    (20, 8, "LT", "add(%i, %by)", 0),
    (8, 0, "GT", "subtract(%by, %i)", None),
    (0, 8, "EQ", "add(%i, %by)", None),
    (0, 8, "LT", "multiply(%i, %by)", None),
])
def test_trip_counts(initial, bound, direction, step, trips):
    """The condition is a fusion, and the bound is carried by the loop, as XLA may have them."""
    others = computation("twice", """
        %p = s32[] parameter(0)
        %four = s32[] constant(4)
        ROOT %more = s32[] add(%p, %four)
    """) + computation("fused", f"""
        %p.0 = s32[] parameter(0)
        %p.1 = s32[] parameter(1)
        ROOT %less = pred[] compare(%p.1, %p.0), direction={direction}
    """) + computation("cond", """
        %p = (s32[], s32[]) parameter(0)
        %i = s32[] get-tuple-element(%p), index=0
        %n = s32[] get-tuple-element(%p), index=1
        ROOT %f = pred[] fusion(%n, %i), kind=kLoop, calls=%fused
    """) + computation("body", f"""
        %p = (s32[], s32[]) parameter(0)
        %i = s32[] get-tuple-element(%p), index=0
        %n = s32[] get-tuple-element(%p), index=1
        %by = s32[] constant(2)
        %next = s32[] {step}
        %moved = s32[] copy(%next)
        ROOT %out = (s32[], s32[]) tuple(%moved, %n)
    """)
    found = program(f"""
        %a = s32[] constant({initial})
        %b = s32[] constant({bound})
        %c = s32[] copy(%b)
        %initial = (s32[], s32[]) tuple(%a, %c)
        %w = (s32[], s32[]) while(%initial), condition=%cond, body=%body
    """, others)
    assert unknown_loops(found) == ([] if trips is not None else ["w"])
    assert runs(found)["body"] == (1 if trips is None else trips)


def test_a_bound_that_moves_is_none():
    others = computation("cond", """
        %p = (s32[], s32[]) parameter(0)
        %i = s32[] get-tuple-element(%p), index=0
        %n = s32[] get-tuple-element(%p), index=1
        ROOT %less = pred[] compare(%i, %n), direction=LT
    """) + computation("body", """
        %p = (s32[], s32[]) parameter(0)
        %i = s32[] get-tuple-element(%p), index=0
        %n = s32[] get-tuple-element(%p), index=1
        %one = s32[] constant(1)
        %two = s32[] constant(2)
        %next = s32[] add(%i, %two)
        %moved = s32[] add(%n, %one)
        ROOT %out = (s32[], s32[]) tuple(%next, %moved)
    """)
    found = program("""
        %a = s32[] constant(0)
        %b = s32[] constant(8)
        %initial = (s32[], s32[]) tuple(%a, %b)
        %w = (s32[], s32[]) while(%initial), condition=%cond, body=%body
    """, others)
    assert unknown_loops(found) == ["w"]


# Of 400 bytes in groups of 4, and of 8.
@pytest.mark.parametrize("line, sent, group", [
    ("all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}", 3 * 400, 4),
    ("all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add", 2 * 300, 4),
    ("reduce-scatter(%x), replica_groups=[2,4]<=[8], to_apply=%add", 300, 4),
    ("all-to-all(%x), replica_groups=[2,4]<=[8]", 300, 4),
    ("all-to-all(%x, %x), replica_groups={}", 700, 8),
    ("collective-permute(%x), source_target_pairs={{0,1},{1,0}}", 400, 2),
    ("collective-broadcast(%x), replica_groups=[2,4]<=[8]", 400, 4),
    ("ragged-all-to-all(%x, %small, %s, %s, %s, %s), replica_groups=[2,4]<=[8]", 40, 4),
    ("ragged-all-to-all(%small, %x, %s, %s, %s, %s), replica_groups=[2,4]<=[8]", 40, 4),
    ("all-reduce(%x), replica_groups=[8,1]<=[8], to_apply=%add", 0, 1),
])
def test_bytes_sent(line, sent, group):
    found = program(f"""
        %x = f32[100] parameter(0)
        %small = f32[10] parameter(1)
        %s = s32[4] parameter(2)
        %c = f32[999] {line}, metadata={{op_name="jit(f)/there"}}
    """)
    (collective,) = collectives(found, 8)
    assert (collective.sent, collective.group, collective.times) == (sent, group, 1)
    assert collective.kind == line.partition("(")[0] and collective.op_name == "jit(f)/there"
    assert not collective.is_async and not collective.crosses and collective.slow == 0


# Slices of two devices, a group of all eight: four slices.
@pytest.mark.parametrize("line, per_slice, slow", [
    ("all-gather(%x), replica_groups={}", 2, 3 * 400),  # the other slices' shares, once for each
    ("reduce-scatter(%x), replica_groups={}, to_apply=%add", 2, 3 / 4 * 400 / 2),
    ("all-reduce(%x), replica_groups={}, to_apply=%add", 2, 2 * 3 / 4 * 400 / 2),
    ("all-to-all(%x), replica_groups={}", 2, 6 / 8 * 400),
    ("ragged-all-to-all(%x, %x, %x, %x, %x, %x), replica_groups={}", 2, 6 / 7 * 400),
    ("all-gather(%x), replica_groups=[4,2]<=[8]", 2, 0),
    ("all-gather(%x), replica_groups=[4,2]<=[2,4]T(1,0)", 2, 400),  # a device of each
    ("all-gather(%x), replica_groups=[4,2]<=[2,4]T(1,0)", 8, 0),
    ("collective-permute(%x), source_target_pairs={{0,1},{1,2}}", 2, 400),
    ("collective-permute(%x), source_target_pairs={{0,1},{2,3}}", 2, 0),
])
def test_bytes_to_other_slices(line, per_slice, slow):
    found = program(f"%x = f32[100] parameter(0)\n%c = f32[1] {line}")
    (collective,) = collectives(found, per_slice)
    assert collective.slow == pytest.approx(slow) and collective.crosses == (slow > 0)
    assert collective.slow <= collective.sent


def wrapped(collective: str, name: str = "wrapped") -> str:
    return computation(name, f"%p = f32[100] parameter(0)\nROOT %c = f32[800] {collective}")


GATHER = f"all-gather(%p), {ALL}, dimensions={{0}}"
CHAIN = f'{GATHER}, frontend_attributes={{chain_id="3"}}'
# Each way to write an all-gather of 400 bytes from each of eight devices, and where it ends.
FORMS = {
    "synchronous": ("", f"%a = f32[800] {GATHER}", None),
    "start and done": ("", f"""
        %a = (f32[100], f32[800]) all-gather-start(%p), {ALL}, dimensions={{0}}
        %b = f32[800] all-gather-done(%a)
    """, "b"),
    "said to be synchronous, on GPU": ("", f"""
        %a = (f32[100], f32[800]) all-gather-start(%p), {ALL}, backend_config={{"is_sync":true}}
        %b = f32[800] all-gather-done(%a)
    """, None),
    "of any instruction": (wrapped(GATHER), """
        %a = ((f32[100]), f32[800], s32[]) async-start(%p), calls=%wrapped
        %u = ((f32[100]), f32[800], s32[]) async-update(%a)
        %b = f32[800] async-done(%u)
    """, "b"),
    "on a SparseCore": (wrapped(GATHER), """
        %a = ((f32[100]), f32[800]) call-start(%p), to_apply=%wrapped
        %b = f32[800] call-done(%a)
    """, "b"),
    "in a fusion": (
        wrapped(GATHER), "%a = f32[800] fusion(%p), kind=kCustom, calls=%wrapped", None
    ),
    "in a chain of fusions": (
        computation("first", f"""
            %p = f32[100] parameter(0)
            %g = f32[800] {CHAIN}
            ROOT %s = (f32[9], f32[8]) custom-call(%g), custom_call_target="AsyncCollectiveStart"
        """) + computation("middle", f"""
            %p = f32[100] parameter(0)
            %g = f32[800] {CHAIN}
            ROOT %t = (f32[100], f32[800]) tuple(%p, %g)
        """) + computation("last", f"""
            %p = f32[100] parameter(0)
            %g = f32[800] {CHAIN}
            ROOT %s = f32[800] custom-call(%p, %g), custom_call_target="AsyncCollectiveDone"
        """),
        """
        %a = (f32[100], f32[800]) fusion(%p), kind=kCustom, calls=%first
        %m = (f32[100], f32[800]) fusion(%p), kind=kCustom, calls=%middle
        %b = f32[800] fusion(%p), kind=kCustom, calls=%last
        """,
        "b",
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_counts_once(form):
    others, lines, done = FORMS[form]
    (collective,) = collectives(program(f"%p = f32[100] parameter(0)\n{lines}", others), 8)
    assert collective[:2] == ("all-gather", "a") and collective.done == done
    assert collective.sent == 7 * 400 and collective.computation == "main"


def test_two_chains_of_fusions_at_once_end_where_each_does():
    others, lines, _ = FORMS["in a chain of fusions"]
    again = others.replace('"3"', '"4"')
    for name in ("first", "middle", "last"):
        again = again.replace(f"%{name} ", f"%{name}.2 ")
    second = lines.replace("%a =", "%c =").replace("%m =", "%n =").replace("%b =", "%d =")
    for name in ("first", "middle", "last"):
        second = second.replace(f"=%{name}", f"=%{name}.2")
    begin, middle, end = lines.strip().split("\n")
    text = "\n".join(["%p = f32[100] parameter(0)", begin, second, middle, end])
    found = program(text, others + again)
    assert {x.name: x.done for x in collectives(found, 8)} == {"a": "b", "c": "d"}


def test_a_collective_without_a_name_has_that_of_what_reads_it():
    named = 'metadata={op_name="jit(f)/experts/gather"}'
    for reader, operand, name in ((named, "", "jit(f)/experts/gather"),
                                  ("", named, "jit(f)/experts/gather"), ("", "", "")):
        (collective,) = collectives(program(f"""
            %p = f32[100] parameter(0), {operand}
            %a = (f32[100], f32[800]) all-gather-start(%p), {ALL}
            %b = f32[800] all-gather-done(%a)
            %c = f32[800] negate(%b), {reader}
        """), 8)
        assert collective.op_name == name


def test_an_all_reduce_of_which_a_part_is_kept_is_a_reduce_scatter():
    inner = computation("part", f"""
        %p = f32[800] parameter(0)
        %r = f32[800] all-reduce(%p), {ALL}, to_apply=%add
        %zero = s32[] constant(0)
        ROOT %s = f32[100] dynamic-slice(%r, %zero), dynamic_slice_sizes={{100}}
    """)
    found = program("""
        %p = f32[800] parameter(0)
        %a = f32[100] fusion(%p), kind=kCustom, calls=%part
    """, inner)
    (collective,) = collectives(found, 8)
    assert collective.kind == "reduce-scatter" and collective.sent == 7 / 8 * 3200
    assert compute_seconds(found, TPU) == 0


def test_what_hosts_send_between_slices_ends_when_it_is_received():
    """As libtpu writes it for several slices, each of which has its own program's devices."""
    transfer = (
        'is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="r_%s",'
        '_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="%s"}'
    )
    reduce, gather = transfer % (0, "ALL_REDUCE"), transfer % (1, "ALL_GATHER")
    found = program(f"""
        %p = f32[100] parameter(0)
        %t = token[] after-all()
        %s.0 = (f32[100], u32[], token[]) send(%p, %t), channel_id=1, {reduce}
        %s.1 = (f32[100], u32[], token[]) send(%p, %t), channel_id=3, {gather}
        %r.1 = (f32[200], u32[], token[]) recv(%t), channel_id=4, {gather}
        %r.0 = (f32[100], u32[], token[]) recv(%t), channel_id=2, {reduce}
        %d.0 = token[] send-done(%s.0), channel_id=1
        %e.0 = (f32[100], token[]) recv-done(%r.0), channel_id=2
        %e.1 = (f32[200], token[]) recv-done(%r.1), channel_id=4
    """)
    reduced, gathered = collectives(found, 4)
    assert (reduced.kind, reduced.done, reduced.slow) == ("all-reduce", "e.0", 400)
    assert (gathered.kind, gathered.done, gathered.slow) == ("all-gather", "e.1", 400)
    assert reduced.crosses and reduced.sent == reduced.slow


def cost(line: str, others: str = "", chip: Chip = TPU) -> tuple[float, float]:
    """Return the operations and the bytes of the instruction %x."""
    found = program(line, others)
    main = found.computations["main"]
    costs = Costs(found, chip)
    return costs.flops(main, main.by_name["x"]), costs.traffic(main, main.by_name["x"])


PRODUCT = "%a = bf16[8,16] parameter(0)\n%b = bf16[16,32] parameter(1)\n"
PRODUCT_BYTES = 2 * (8 * 16 + 16 * 32 + 8 * 32)


@pytest.mark.parametrize("line, flops", [
    ("%x = bf16[8,32] dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
     2 * 8 * 16 * 32),
    ("%x = bf16[8,32] convolution(%a, %b), dim_labels=bf_io->bf", 2 * 8 * 16 * 32),
    ('%x = bf16[8,32] custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config='
     '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}',
     2 * 8 * 16 * 32),
    ("%x = bf16[8,32] add(%a, %b)", 0),
])
def test_cost_of_products(line, flops):
    assert cost(PRODUCT + line) == (flops, PRODUCT_BYTES)


def test_cost_of_a_convolution():
    """Images of 5 x 5, filters of 3 x 3, padding: at an edge of each axis 2 of 3 taps meet."""
    window = "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f"
    flops, _ = cost(f"""
        %a = f32[2,5,5,4] parameter(0)
        %b = f32[3,3,4,6] parameter(1)
        %x = f32[2,5,5,6] convolution(%a, %b), {window}
    """)
    assert flops == 2 * 2 * 4 * 6 * (2 + 3 + 3 + 3 + 2) ** 2


def test_cost_of_a_batch_of_products_as_a_convolution():
    """The TPU compiler's form of 16 products of [8, 32] and [32, 64]."""
    window = "window={size=16 stride=15 lhs_dilate=16}, dim_labels=0bf_0io->0bf"
    flops, _ = cost(f"""
        %a = f32[16,8,32] parameter(0)
        %b = f32[16,32,64] parameter(1)
        %x = f32[16,8,64] convolution(%a, %b), {window}
    """)
    assert flops == 2 * 16 * 8 * 32 * 64


def test_a_strided_convolution():
    window = "window={size=3 stride=2 rhs_dilate=2}, dim_labels=b0f_0io->b0f"
    flops, _ = cost(f"""
        %a = f32[1,10,1] parameter(0)
        %b = f32[3,1,1] parameter(1)
        %x = f32[1,4,1] convolution(%a, %b), {window}
    """)
    assert flops == 2 * (3 * 4 - 1)  # the last window ends behind the array: 6, 8, 10


def test_a_fusion_reads_what_it_uses_of_its_operands():
    """A slice of a stack, through a fusion in the fusion; and writes a slice of another."""
    others = computation("view", """
        %p = f32[40,100] parameter(0)
        %i = s32[] parameter(1)
        %zero = s32[] constant(0)
        ROOT %s = f32[1,100] dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,100}
    """) + computation("fused", """
        %stack = f32[40,100] parameter(0)
        %i = s32[] parameter(1)
        %out = f32[40,100] parameter(2)
        %on = f32[7] parameter(3)
        %part = f32[1,100] fusion(%stack, %i), kind=kLoop, calls=%view
        %zero = s32[] constant(0)
        %new = f32[40,100] dynamic-update-slice(%out, %part, %i, %zero)
        ROOT %t = (f32[40,100], f32[7]) tuple(%new, %on)
    """)
    flops, traffic = cost("""
        %a = f32[40,100] parameter(0)
        %i = s32[] parameter(1)
        %b = f32[40,100] parameter(2)
        %c = f32[7] parameter(3)
        %x = (f32[40,100], f32[7]) fusion(%a, %i, %b, %c), kind=kLoop, calls=%fused
    """, others)
    assert flops == 0
    assert traffic == 400 + 4 + 400  # what is passed on is neither read nor written


def test_memory_of_the_chip_costs_no_traffic():
    line = """
        %a = f32[100]{0:T(128)S(1)} parameter(0)
        %b = f32[100]{0:T(128)} parameter(1)
        %x = f32[100]{0:T(128)S(1)} add(%a, %b)
    """
    assert cost(line)[1] == 400
    assert cost(line, chip=GPU)[1] == 1200  # there the number means something else


@pytest.mark.parametrize("line, traffic", [
    ("dynamic-slice(%a, %i), dynamic_slice_sizes={10}", 2 * 40),
    ("gather(%a, %i)", 2 * 40),
    ("scatter(%a, %i, %b), to_apply=%add", 2 * 80),
    ("reduce(%a, %i), to_apply=%add", 400 + 4 + 40),
    ('custom-call(%a), custom_call_target="kernel"', 400 + 40),
])
def test_traffic(line, traffic):
    start = "%a = f32[100] parameter(0)\n%i = s32[] parameter(1)\n%b = f32[20] parameter(2)\n"
    assert cost(f"{start}%x = f32[10] {line}") == (0, traffic)


def test_copies_between_memory_and_chip_cost_one_way():
    on, off = "f32[100]{0:T(128)S(1)}", "f32[100]{0:T(128)}"
    for source, target, traffic in ((off, on, 400), (on, off, 400), (off, off, 800)):
        line = f"""
            %a = {source} parameter(0)
            %x = ({target}, {source}, u32[]{{:S(2)}}) copy-start(%a)
            %b = {target} copy-done(%x)
        """
        assert cost(line) == (0, traffic)
        assert compute_seconds(program(line), TPU) == pytest.approx(traffic / 1e6)


def test_an_update_in_place_costs_what_is_new():
    assert cost("""
        %a = f32[100] parameter(0)
        %b = f32[10] parameter(1)
        %i = s32[] parameter(2)
        %x = f32[100] dynamic-update-slice(%a, %b, %i)
    """) == (0, 2 * 40)


@pytest.mark.parametrize("estimate, seconds", [
    ('"cost_estimate":{"flops":"5000000","transcendentals":"7","bytes_accessed":"3000000"},', 5),
    ('"cost_estimate":{"flops":"5000","transcendentals":"7","bytes_accessed":"3000000"},', 3),
    ("", 800e-6),
])
def test_kernels_cost_what_they_say(estimate, seconds):
    config = f'{{"custom_call_config":{{"body":"TUzv",{estimate}"needs_layout_passes":true}}}}'
    found = program(f"""
        %a = f32[100] parameter(0)
        %x = f32[100] custom-call(%a), custom_call_target="kernel", backend_config={config}
    """)
    assert compute_seconds(found, TPU) == pytest.approx(seconds)


def work(name: str, seconds: float) -> str:
    """Return an instruction that takes seconds, by its traffic."""
    return f"%{name} = u8[{round(seconds * 1e6)}] iota(), iota_dimension=0"


def sends(name: str, seconds: float, scope: str = "f") -> str:
    """Return the beginning of a permutation that takes seconds on the fast network."""
    return (
        f"%{name}.x = u8[{round(seconds * 1e3)}] parameter(0)\n"
        f"%{name} = (u8[8], u8[8]) collective-permute-start(%{name}.x), "
        f'source_target_pairs={{{{0,1}}}}, metadata={{op_name="jit(f)/{scope}/permute"}}'
    )


def ends(name: str) -> str:
    return f"%{name}.done = u8[8] collective-permute-done(%{name})"


def hidden(lines: list[str], others: str = "", per_slice: int = 8) -> dict[str, float]:
    """Return the hidden seconds of each collective by its name."""
    found = program("\n".join(lines), others)
    return {x.collective.name: x.hidden for x in timed_collectives(found, TPU, per_slice)}


def test_what_is_computed_meanwhile_hides():
    lines = [work("w", 9), sends("a", 3), work("x", 2), ends("a"), work("y", 9)]
    assert hidden(lines) == {"a": pytest.approx(2)}
    found = program("\n".join(lines))
    assert overlap(found, TPU, devices_per_slice=8) == {"collective-permute": (3, pytest.approx(2))}
    assert compute_seconds(found, TPU) == pytest.approx(20)


def test_no_more_is_hidden_than_there_is():
    assert hidden([sends("a", 3), work("x", 5), ends("a")]) == {"a": pytest.approx(3)}
    lines = [sends("a", 3), work("x", 2), work("y", 2), ends("a")]
    assert hidden(lines) == {"a": pytest.approx(3)}


def test_a_slow_network_takes_longer():
    lines = [sends("a", 3), work("x", 50), ends("a")]
    assert hidden(lines, per_slice=1) == {"a": pytest.approx(30)}  # a tenth of the speed


def test_two_at_once_share_what_is_computed():
    """That which is waited for first comes first, whichever has begun first."""
    lines = [
        sends("a", 4), work("w", 1), sends("b", 2), work("x", 3), ends("b"), work("y", 1), ends("a")
    ]
    # w hides 1 of a; x first 2 of b, then 1 of a; y 1 of a.
    assert hidden(lines) == {"a": pytest.approx(3), "b": pytest.approx(2)}


def test_a_loop_hides_what_is_around_it_with_what_it_has_left():
    body = "\n".join([sends("c", 1), work("z", 3), ends("c")])
    lines = [
        START, sends("a", 30),
        "%w = (s32[], f32[4]) while(%initial), condition=%l_cond, body=%l_body", ends("a"),
    ]
    found = hidden(lines, loop("l", body, 4))
    assert found["c"] == pytest.approx(4 * 1)
    assert found["a"] == pytest.approx(4 * 2, rel=1e-4)  # and the few bytes of the counter


def test_synchronous_collectives_hide_nothing_and_are_no_computation():
    reduce = f"%r = u8[1000] all-reduce(%a.x), {ALL}, to_apply=%add"
    lines = [sends("a", 1), reduce, ends("a"), work("x", 5)]
    assert hidden(lines) == {"a": 0, "r": 0}


def test_the_longest_branch_counts():
    others = computation("short", f"ROOT {work('s', 1)}") + computation("long", f"""
        {work("l", 2)}
        ROOT {work("m", 1)}
    """)
    lines = [
        "%i = s32[] parameter(1)", sends("a", 9),
        "%c = u8[1] conditional(%i, %i, %i), branch_computations={%short, %long}", ends("a"),
    ]
    assert hidden(lines, others) == {"a": pytest.approx(3)}


def test_what_is_rare_takes_the_shortest_branch_and_sends_nothing():
    others = computation("short", f"ROOT {work('s', 1)}") + computation("long", f"""
        {sends("b", 7, "further")}
        {work("l", 2)}
        ROOT {ends("b")}
    """)
    lines = [
        "%i = s32[] parameter(1)", sends("a", 9),
        "%c = u8[1] conditional(%i, %i, %i), branch_computations={%short, %long}, "
        'metadata={op_name="jit(f)/further/cond"}', ends("a"),
    ]
    found, rare = program("\n".join(lines), others), lambda op_name: "/further/" in op_name
    assert compute_seconds(found, TPU) == pytest.approx(2)
    assert compute_seconds(found, TPU, rare) == pytest.approx(1)
    assert overlap(found, TPU, devices_per_slice=8, rare=rare) == {
        "collective-permute": (9, pytest.approx(1))
    }


def test_fusions_of_a_chain_hide_its_exchange():
    """The product in the middle takes 2 * 100 * 100 * 200 / 10^6 = 4 s; 2800 bytes take 2.8 s."""
    others, lines, _ = FORMS["in a chain of fusions"]
    others = others.replace("ROOT %t =", (
        "%l = f32[100,100] parameter(1)\n  %r = f32[100,200] parameter(2)\n"
        "  %d = f32[100,200] dot(%l, %r), lhs_contracting_dims={1}, rhs_contracting_dims={0}\n"
        "  ROOT %t ="
    ))
    lines = lines.replace("fusion(%p), kind=kCustom, calls=%middle",
                          "fusion(%p, %p.1, %p.2), kind=kCustom, calls=%middle")
    start = (
        "%p = f32[100] parameter(0)\n%p.1 = f32[100,100] parameter(1)\n"
        "%p.2 = f32[100,200] parameter(2)\n"
    )
    found = program(start + lines, others)
    assert overlap(found, TPU, devices_per_slice=8) == {"all-gather": (2.8, pytest.approx(2.8))}
    assert compute_seconds(found, TPU) == pytest.approx(4)


def test_collectives_can_be_chosen():
    lines = [
        sends("a", 2, "experts"), work("x", 1), ends("a"), sends("b", 5), work("y", 5), ends("b")
    ]
    found = program("\n".join(lines))
    of_experts = overlap(
        found, TPU, devices_per_slice=8, chosen=lambda x: "/experts/" in x.op_name
    )
    assert of_experts == {"collective-permute": (2, pytest.approx(1))}
    assert of_experts["collective-permute"].hidden_share == pytest.approx(0.5)
    both = total(overlap(found, TPU, devices_per_slice=8).values())
    assert both == (7, pytest.approx(6))
    assert overlap(found, TPU, devices_per_slice=8, chosen=lambda x: False) == {}
    assert Overlap(0.0, 0.0).hidden_share == 1
