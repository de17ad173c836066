"""The compiler's estimate is read from the text of a program as its schedule runs it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mistral_jax.checkpoint.lora import Lora
from mistral_jax.cli import plan
from mistral_jax.config import ModelConfig
from mistral_jax.model.attention import visible
from mistral_jax.model.transformer import Transformer
from mistral_jax.ops import flash
from mistral_jax.parallel import hardware
from mistral_jax.parallel.hardware import Hardware
from mistral_jax.parallel.sharding import Layout, read_layout
from mistral_jax.planning import arithmetic, cycles, forecast, programs, report
from mistral_jax.planning.estimate import Estimate
from mistral_jax.planning.hlo import Program

# A cycle takes a second, as do a FLOP and a byte in memory; 2 bytes a second go over a link.
CHIP = Hardware("chip", 100, 1, 1, 2, "", clock=1.0)

HLO = r"""HloModule jit_decode, is_scheduled=true

%fused (p: f32[4]) -> f32[4] {
  ROOT %inside = f32[4]{0} add(%p, %p), backend_config={"estimated_cycles":"1000"}
}

%no (p: f32[4]) -> f32[4] {
  ROOT %cheap = f32[4]{0} copy(%p), backend_config={"estimated_cycles":"2"}
}

%yes (p: f32[4]) -> f32[4] {
  ROOT %dear = f32[4]{0} copy(%p), backend_config={"estimated_cycles":"50"}
}

%inner_condition (s: (s32[])) -> pred[] {
  %limit = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%inner_body (s: (s32[])) -> (s32[]) {
  %step = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/while/body/Transformer/Transformer._blocks/layers_1/mlp/down_proj/...X,YX->...Y/dot_general"}, backend_config={"estimated_cycles":"10"}
  ROOT %out = (s32[]) tuple(%i)
}

%body (s: (s32[])) -> (s32[]) {
  %known = (s32[]) while(%s), condition=%outer_condition, body=%inner_body, backend_config={"known_trip_count":{"n":"5"}}
  %limited = (s32[]) while(%s), condition=%inner_condition, body=%inner_body
  %start = (f32[4]{0}, f32[4]{0}) copy-start(%x)
  %sampled = f32[4]{0} conditional(%p, %a, %b), branch_computations={%no, %yes}, metadata={op_name="jit(f)/while/body/cond"}
  %inside_model = f32[4]{0} conditional(%p, %a, %b), true_computation=%yes, false_computation=%no, metadata={op_name="jit(f)/while/body/Transformer/cond"}
  %done = f32[4]{0} copy-done(%start)
  ROOT %out.2 = (s32[]) tuple(%i)
}

%outer_condition (s: (s32[])) -> pred[] {
  ROOT %more = pred[] fusion(%s), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"1"}
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %before = f32[4]{0} fusion(%p), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"100"}
  %loop = (s32[]) while(%init), condition=%outer_condition, body=%body
  ROOT %end = f32[4]{0} copy(%p), backend_config={"estimated_cycles":"7"}
}
"""  # noqa: E501


def seconds(text, **options):
    return cycles.total(cycles.read(text, CHIP, **options))


def entry(*lines):
    """Returns the text of a program with these instructions."""
    body = "\n".join(f"  {line}" for line in lines)
    return f"ENTRY %main (p: f32[4]) -> f32[4] {{\n{body}\n  {timed('%last', 0)}\n}}\n"


def timed(name, count, operation="copy(%p)"):
    return f'{name} = f32[4]{{0}} {operation}, backend_config={{"estimated_cycles":"{count}"}}'


def kernel(name, cost="", metadata="{}"):
    """Returns a Pallas kernel of 2 x 4 x 8 queries and 2 x 16 x 8 keys in bfloat16."""
    shapes = "bf16[2,4,8]{2,1,0}, bf16[2,16,8]{2,1,0}, bf16[2,16,8]{2,1,0}"
    return (
        f"%{name}.3 = bf16[2,4,8]{{2,1,0}} custom-call(%q, /*index=1*/%k, %v), "
        f'custom_call_target="tpu_custom_call", operand_layout_constraints={{{shapes}}}, '
        f"frontend_attributes={{kernel_metadata={metadata}}}, "
        f'metadata={{op_name="jit(f)/Transformer/layers_0/attn/{name}/pallas_call"}}, '
        f'backend_config={{"custom_call_config":{{"body":"AA="{cost}}}}}'
    )


def test_a_program_counts_what_its_schedule_runs():
    # Fusions count as a whole, loops as often as they run, the most costly branch of a conditional.
    step = (5 + 3) * 10 + 5 * 1 + 50 + 50
    assert seconds(HLO) == 100 + (step + 1) + 7


def test_a_step_of_decoding_is_one_pass_of_the_outermost_loop_for_greedy_rows():
    assert seconds(HLO, steps=True) == (5 + 3) * 10 + 5 * 1 + 2 + 50 + 1


def test_a_program_without_estimates_has_none():
    assert cycles.read(HLO.replace("estimated_cycles", "other"), CHIP) == []
    assert cycles.read(HLO, dataclasses.replace(CHIP, clock=None)) == []


def test_operations_of_all_layers_are_joined_by_their_place():
    places = cycles.costly(cycles.read(HLO, CHIP, steps=True), 2)
    assert places[0] == ("layers/mlp/down_proj (dot_general)", 80, 8)
    assert places[1] == ("dear of f32[4], added by XLA", 50, 1)


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ("jit(f)/transpose(jvp(Transformer))/layers_3/mlp/mul", "layers/mlp, backward (mul)"),
        (
            "jit(f)/jvp(Transformer)/checkpoint/rematted_computation/layers_0/attn/mul",
            "layers/attn, again (mul)",
        ),
        ("jit(f)/while/body/cond/branch_1_fun/reduce_sum", "outside the model (reduce_sum)"),
        ("", "copy of bf16[8,128], added by XLA"),
    ],
)
def test_a_place_is_readable(source, place):
    assert cycles.Operation("copy.12", "(bf16[8,128]{1,0}, u32[])", source, 1, 1).place == place


def test_a_kernel_counts_its_stated_cost():
    cost = ',"cost_estimate":{"flops":"40","transcendentals":"900","bytes_accessed":"30"}'
    assert seconds(entry(kernel("attend_chunk", cost))) == 40
    assert seconds(entry(kernel("attend_chunk", cost.replace("30", "50")))) == 50
    # Only kernels of attention skip keys.
    assert seconds(entry(kernel("attend_chunk", cost)), attended=0.25) == 10
    assert seconds(entry(kernel("write_chunk", cost)), attended=0.25) == 40


def test_the_kernel_of_prompts_counts_at_its_share_of_the_peak():
    cost = ',"cost_estimate":{"flops":"40","bytes_accessed":"30"}'
    known = hardware.known().values()
    for kind, share in flash.PEAK_SHARES.items():
        assert any(kind in chip.kinds for chip in known)
        chip = dataclasses.replace(CHIP, kinds=(kind,))
        text = entry(kernel(flash.NAME, cost)), entry(kernel("another", cost))
        assert [cycles.total(cycles.read(each, chip)) for each in text] == [40 / share, 40]


def test_a_kernel_without_a_stated_cost_is_counted_at_60_percent():
    moved = 2 * (64 + 256 + 256 + 64)
    assert seconds(entry(kernel("write_chunk"))) == pytest.approx(moved / 0.6)
    pairs = 2 * 4 * 16
    for name, products in (("attend_chunk", 2), ("splash_mha_dkv", 4), ("splash_mha_dq_x", 3)):
        flops = 2 * products * pairs * 8
        assert seconds(entry(kernel(name))) == pytest.approx(flops / 0.6)
    assert seconds(entry(kernel("splash_mha_fwd")), attended=0.5) == pytest.approx(
        max(moved, pairs * 16) / 0.6
    )


def test_copies_in_the_background_are_told_apart():
    copies = [
        "%c = (f32[4]{0:S(1)}, f32[4]{0}, u32[]{:S(2)}) copy-start(%p)",
        "%s = ((f32[9]{0}), f32[2]{0:S(1)}, u32[]{:S(2)}) slice-start(%p), slice={[0:2]}",
    ]
    found = cycles.read(entry(*copies, timed("%x", 5)), CHIP)
    assert (cycles.total(found), cycles.copied(found)) == (5, 4 * (4 + 2))
    assert [place for place, *_ in cycles.costly(found)] == ["x of f32[4], added by XLA"]


def test_metadata_of_several_lines_belongs_to_its_instruction():
    cost = ',"cost_estimate":{"flops":"40","bytes_accessed":"30"}'
    text = entry(kernel("splash_mha_fwd", cost, '{\n"xprof":"{\\"block_q\\": 512}"\n}'))
    assert seconds(text) == 40
    (operation,) = cycles.read(text, CHIP)
    assert operation.place == "layers/attn (kernel splash_mha_fwd)"


GATHER = "(f32[4]{0}, f32[8]{0}) all-gather-start(%p), channel_id=1, replica_groups={{0,1}}"


def test_an_exchange_counts_where_an_operation_waits_for_it():
    """16 bytes of which half are sent, at 2 bytes a second: 8 seconds."""
    chip = dataclasses.replace(CHIP, link=2.0)
    start, done = f"%ag = {GATHER}", "%got = f32[8]{0} all-gather-done(%ag)"
    for between, wait in ((0, 8), (3, 5), (20, 0)):
        text = entry(start, timed("%x", between), done, timed("%y", 1))
        found = cycles.read(text, chip, devices=2)
        assert cycles.total(each for each in found if each.kind == "wait") == wait
        assert cycles.total(found) == between + wait + 1
    at_once = entry("%ag = f32[8]{0} all-gather(%p), channel_id=1, replica_groups={{0,1}}")
    assert seconds(at_once, devices=2) == 8
    others = [line.replace("%ag", "%ag2").replace("_id=1", "_id=2") for line in (start, done)]
    others[1] = others[1].replace("%got", "%got2")
    # Both use the same links.
    both = entry(start, others[0], done, timed("%y", 1), others[1])
    assert seconds(both, devices=2) == 16


def test_a_sparse_core_exchanges_in_the_background():
    """The final program calls it with `call-start`, and names the computation as a reduction."""
    called = (
        "%called (p: f32[4]) -> f32[8] {\n  ROOT %ag = f32[8]{0} all-gather(%p), channel_id=1, "
        "replica_groups={{0,1}}\n}\n\n"
    )
    start = (
        "%c = ((f32[4]{0}, token[]), f32[8]{0}) call-start(%p, %token), "
        'async_execution_thread="sparsecore", to_apply=%called'
    )
    done = "%got = f32[8]{0} call-done(%c)"
    for between, wait in ((0, 8), (3, 5), (20, 0)):
        text = called + entry(start, timed("%x", between), done, timed("%y", 1))
        found = cycles.read(text, CHIP, devices=2)
        assert cycles.total(each for each in found if each.kind == "wait") == wait
        assert cycles.total(found) == between + wait + 1


def test_a_short_exchange_shares_the_links_with_one_in_the_background():
    """It does not wait for all of that one, which ends later by the time of the short one."""
    start, done = f"%ag = {GATHER}", "%got = f32[8]{0} all-gather-done(%ag)"
    short = "%small = f32[2]{0} all-gather(%p), channel_id=2, replica_groups={{0,1}}"  # 2 seconds
    found = cycles.read(entry(start, short, timed("%x", 1), done), CHIP, devices=2)
    waits = [each.seconds for each in found if each.kind == "wait"]
    assert waits == [4, 8 + 2 - 4 - 1]
    # The first one is almost done.
    found = cycles.read(entry(start, timed("%x", 7), short, done), CHIP, devices=2)
    assert [each.seconds for each in found if each.kind == "wait"] == [3]


def test_an_exchange_inside_of_fusions_ends_with_the_last_of_them():
    piece = (
        "%piece (p: f32[4]) -> f32[8] {\n  ROOT %ag = f32[8]{0} all-gather(%p), channel_id=1, "
        "replica_groups={{0,1}}\n}\n\n"
    )
    fusions = [timed(f"%f{i}", 3, "fusion(%p), kind=kCustom, calls=%piece") for i in range(2)]
    assert seconds(piece + entry(*fusions), devices=2) == 8
    assert seconds(piece + entry(fusions[0], timed("%x", 4), fusions[1]), devices=2) == 10


@pytest.mark.parametrize("window", [None, 2048, 4096])
def test_kernels_of_attention_compute_the_blocks_that_are_seen(window):
    """Against a count of blocks, of a mask of all pairs."""
    config = dataclasses.replace(ModelConfig.from_name("mistral-7b-v0.3"), sliding_window=window)
    model, block = Transformer(config), 512
    of = programs.Shapes(1, 8192, jnp.dtype("bfloat16"), 1024)
    positions = np.arange(of.length)
    seen = np.asarray(visible(positions[None], positions[None], window))[0]
    blocks = seen.reshape(of.length // block, block, -1, block).any((1, 3))
    assert arithmetic.attended("train", model, of) == pytest.approx(blocks.mean())
    assert arithmetic.attended("decode", model, of) == 1
    shares = []
    for start in range(0, of.length, of.chunk):
        computed = blocks[start // block : (start + of.chunk) // block].sum() * block**2
        slots = min(window or of.length, of.length)
        shares.append(computed / (of.chunk * (slots + of.chunk)))
        assert arithmetic.attended("prefill", model, of, start) == pytest.approx(shares[-1])
    assert arithmetic.attended("prefill", model, of) == pytest.approx(np.mean(shares))


@pytest.mark.parametrize("sharding", [None, "fsdp"])
def test_adapters_are_trained_beside_frozen_weights(sharding):
    config = dataclasses.replace(ModelConfig.from_name("nano"), num_layers=1)
    one = Layout(jax.make_mesh((1,), ("device",), devices=jax.devices()[:1]), ())
    layout = read_layout(sharding, config) if sharding else one
    of = programs.shapes(layout, 8, 64, "bfloat16", train=True)
    of = dataclasses.replace(of, lora=Lora(rank=4, alpha=8))
    model = programs.model(config, layout, of)
    state = programs.arguments("train", model, layout, of)
    frozen, trained = (jax.tree.leaves(tree) for tree in (state.frozen, state.trainable))
    assert {x.dtype.name for x in frozen} == {"bfloat16"}
    assert {x.dtype.name for x in trained} == {"float32"}
    assert len(trained) == 2 * 7
    results = programs.trace("train", model, layout, of).out_info[0]
    assert jax.tree.structure(results.trainable) == jax.tree.structure(state.trainable)


def test_walks_enter_every_computation():
    walked = [instruction.name for instruction, *_ in Program(HLO).walk()]
    assert walked.count("inside") == 5  # As often as `%fused` is called, on all ways to a caller.
    assert {"cheap", "dear"} <= set(walked)


def planned(**fields):
    base = forecast.Forecast("decode", 2, {"weights": 60}, 30, 1, 1, 1, 1, [], 0, Estimate(1, 2, 0))
    return dataclasses.replace(base, **fields)


def told(of):
    return "\n".join(report.lines([of], CHIP, True))


def test_a_plan_tells_the_compiler_s_estimate_beside_the_least_time():
    of = planned(operations=cycles.read(HLO, CHIP, steps=True))
    assert of.compiler_seconds == 138
    text = told(of)
    assert "by the compiler 0 tokens/s, at best 1 (" in text
    assert "layers/mlp/down_proj (dot_general): 58% of 138 s, 8 runs\n" in text
    assert "the compiler expects 69.0 times the least time" in text
    fields = report.fields(of, CHIP, True)
    assert fields["compiler_tokens_per_second"] == 2 / 138
    assert fields["costly"][0]["share"] == 80 / 138
    assert fields["warning"]


def test_a_plan_warns_only_where_the_two_are_far_apart():
    for seconds, warned in ((1, False), (2.9, False), (3.1, True)):
        of = planned(operations=[cycles.Operation("x", "f32[]", "", seconds, 1)])
        # Copies in the background have no cycles: the estimate is not below the roofline.
        assert of.compiler_seconds == max(seconds, 2)
        assert (report.fields(of, CHIP, True)["warning"] is not None) == warned
        assert ("warning" in told(of)) == warned


def test_a_plan_without_an_estimate_says_nothing_of_it():
    assert planned().compiler_seconds is None
    assert "compiler" not in told(planned())
    fields = report.fields(planned(), CHIP, True)
    names = ("compiler_seconds", "compiler_tokens_per_second", "costly", "warning")
    assert [fields[name] for name in names] == [None] * 4


def test_few_layers_are_planned_and_texts_saved(capsys, tmp_path):
    folder = tmp_path / "new" / "texts"
    arguments = ["nano", "--length", "64", "--layers", "1", "--save-hlo", str(folder)]
    assert plan.main(arguments) == 0
    assert "bfloat16, only 1 of 4 layers: device = 1\n" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == ["decode.txt", "prefill.txt"]
    for path in folder.iterdir():
        text = path.read_text()
        assert "ENTRY" in text
        assert "layers_0" in text
        assert "layers_1" not in text


@pytest.mark.slow
def test_training_with_few_layers_is_saved_too(capsys, tmp_path):
    arguments = ["nano", "--length", "64", "--layers", "2", "--train", "--json"]
    assert plan.main([*arguments, "--save-hlo", str(tmp_path)]) == 0
    fields = json.loads(capsys.readouterr().out)
    assert fields["layers"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["train.txt"]


@pytest.mark.parametrize("count", ["0", "-1", "5"])
def test_a_number_of_layers_that_the_model_has_not_is_one_line(capsys, count):
    assert plan.main(["nano", "--layers", count]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == (
        "",
        f"error: --layers is {count}; expected 1 to 4, the layers of nano\n",
    )


def test_an_exchange_of_a_sparse_core_runs_beside_the_other_work():
    """It is a call in a computation of another unit of the chip."""
    units = (
        "%inner (p: f32[4]) -> f32[8] {\n  ROOT %ag = f32[8]{0} all-gather(%p), channel_id=1, "
        'replica_groups={{0,1}}\n}, execution_thread="sparsecore"\n\n'
        "%outer (p: f32[4]) -> f32[8] {\n  ROOT %c = f32[8]{0} call(%p), to_apply=%inner\n"
        '}, execution_thread="sparsecore"\n\n'
    )
    start = "%s = ((f32[4]{0}), f32[8]{0}) async-start(%p), calls=%outer"
    done = "%d = f32[8]{0} async-done(%s)"
    for between, wait in ((0, 8), (3, 5), (20, 0)):
        text = units + entry(start, timed("%x", between), done, timed("%y", 1))
        assert seconds(text, devices=2) == between + wait + 1
