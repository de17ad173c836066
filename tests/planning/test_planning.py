"""What a plan says is what XLA compiles: collectives array by array, memory, work."""

import collections
import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import together

from mistral_jax.checkpoint import checkpoint, quantization
from mistral_jax.cli import plan
from mistral_jax.config import CHECKOUT, CONFIG_DIR, ModelConfig
from mistral_jax.engine.prefill import empty_cache
from mistral_jax.model.attention import visible
from mistral_jax.model.transformer import Transformer
from mistral_jax.parallel import hardware
from mistral_jax.parallel.sharding import Layout, abstract_params, read_layout
from mistral_jax.planning import arithmetic, forecast, programs, report
from mistral_jax.planning.collectives import Collective, read
from mistral_jax.planning.estimate import estimate

CONFIG = ModelConfig(
    vocab_size=768,
    num_layers=2,
    embed_dim=64,
    mlp_dim=96,
    num_heads=8,
    num_kv_heads=2,
    head_dim=8,
    rope_theta=1e4,
    sliding_window=None,
)
NAMES = sorted({path.stem for path in (CONFIG_DIR / "sharding").glob("*.toml")} - {"single"})


def slow_but(*fast, names=NAMES):
    """Returns parameters, of which all but the given ones are left to `make test-all`."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(autouse=True, scope="module")
def eight_devices():
    """Has JAX begin with those that all tests use, whichever test is the first."""
    assert len(jax.devices()) == 8


def prepare(name, config=CONFIG, remat=None, int8=False, dtype="float32", cache=None):
    """Returns the layout, the model and the sizes."""
    layout = read_layout(name, config)
    model = Transformer(config, jnp.dtype(dtype), layout.rules, remat, kv_cache_dtype=cache)
    small = quantization.matrices(abstract_params(model), output=True) if int8 else None
    return layout, model, programs.shapes(layout, 8, 32, dtype, small, cache)


def compile_for(name, program, **options):
    """Returns the layout, the model, the sizes and the compiled program."""
    layout, model, of = prepare(name, **options)
    return layout, model, of, programs.lower(program, model, layout, of).compile()


def counts(found):
    """Counts the collectives of each kind, size and group."""
    total = collections.Counter()
    for collective in found:
        total[collective.kind, collective.bytes, collective.group] += collective.times
    return total


@pytest.mark.parametrize(
    ("name", "program"),
    [
        pytest.param(n, p, marks=() if n in ("tensor", "fsdp_tensor") else pytest.mark.slow)
        for n in NAMES
        for p in programs.PROGRAMS
        # To generate, `long` leaves the products of single tokens to XLA.
        if n != "long" or p == "train"
    ],
)
def test_devices_exchange_what_the_layout_implies_and_nothing_else(name, program):
    """No weight that should stay put is gathered, no row leaves its device; see `exchanges`.

    Numbers only: ids and flags, of a few bytes, are left out.
    """
    layout, model, of, compiled = compile_for(name, program)
    found = [c for c in read(compiled.as_text(), 8) if c.dtype == "f32" and c.shape]
    if program == "decode":
        found = [c for c in found if c.loops]
    found, expected = counts(found), counts(arithmetic.exchanges(program, model, layout, of))
    assert not expected - found
    extra = found - expected
    if program == "train" and "fsdp" in layout.mesh.shape:
        # The output's weights may be gathered once more on the way back.
        output = abstract_params(model, layout)["lm_head"]["kernel"]
        whole = arithmetic.size(output) * layout.parts("embed")
        extra -= collections.Counter({("all-gather", whole, layout.parts("embed")): 1})
    assert not extra


@pytest.mark.parametrize("name", ["tensor", "fsdp"])
def test_what_is_computed_again_is_exchanged_again(name):
    layout, model, of, compiled = compile_for(name, "train", remat="nothing_saveable")
    found = [c for c in read(compiled.as_text(), 8) if c.dtype == "f32" and c.shape]
    assert counts(found) == counts(arithmetic.exchanges("train", model, layout, of))


@pytest.mark.parametrize("program", programs.PROGRAMS)
@pytest.mark.slow
def test_an_mlp_may_be_split_without_the_heads(program, tmp_path):
    path = tmp_path / "wide.toml"
    path.write_text('[mesh]\ntensor = 8\n[rules]\nmlp = "tensor"\nvocab = "tensor"\n')
    layout, model, of, compiled = compile_for(path, program, remat="nothing_saveable")
    found = [c for c in read(compiled.as_text(), 8) if c.dtype == "f32" and c.shape]
    if program == "decode":
        found = [c for c in found if c.loops]
    assert counts(found) == counts(arithmetic.exchanges(program, model, layout, of))


@pytest.mark.parametrize("cache", [None, "int8"])
@pytest.mark.parametrize("program", ["prefill", "decode"])
@pytest.mark.parametrize("name", slow_but("tensor", names=[n for n in NAMES if n != "long"]))
def test_of_int8_devices_exchange_the_same_and_some_scales(name, program, cache):
    """Where kernels are gathered, XLA's CPU backend does so once they are float32."""
    layout, model, of, compiled = compile_for(name, program, int8=True, cache=cache)
    found = [c for c in read(compiled.as_text(), 8) if c.dtype in ("f32", "s8") and c.shape]
    if program == "decode":
        found = [c for c in found if c.loops]
    expected = arithmetic.exchanges(program, model, layout, of)
    values = [c for c in expected if c.source.endswith("/values")]
    assert len(values) == (7 * 2 + 1 if layout.parts("embed") > 1 else 0)
    wide = [dataclasses.replace(c, bytes=4 * c.bytes) if c in values else c for c in expected]
    assert counts(found) == counts(wide)


@pytest.mark.parametrize("program", ["prefill", "decode"])
@pytest.mark.parametrize("name", ["tensor", "data_tensor"])
def test_a_table_in_int8_is_looked_up_in_it(name, program):
    config = dataclasses.replace(CONFIG, tie_embeddings=True)
    layout, model, of, compiled = compile_for(name, program, config=config, int8=True)
    found = [c for c in read(compiled.as_text(), 8) if c.dtype in ("f32", "s8") and c.shape]
    assert any(c.dtype == "s8" for c in found)
    if program == "decode":
        found = [c for c in found if c.loops]
    assert counts(found) == counts(arithmetic.exchanges(program, model, layout, of))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_int8_is_planned_as_quantize_makes_it(name, tied):
    """Array by array: what it is, and what a device holds of it."""
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    layout, model, of = prepare(name, config=config, int8=True, dtype="bfloat16")
    planned = programs.weights("decode", model, layout, of)
    ones = jax.tree.map(
        lambda x: jax.device_put(jnp.ones(x.shape, jnp.bfloat16), x.sharding),
        abstract_params(model, layout),
    )
    made = quantization.quantize(ones, "int8", of.quantized)
    assert jax.tree.structure(planned) == jax.tree.structure(made)
    for a, b in zip(jax.tree.leaves(planned), jax.tree.leaves(made), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.sharding.shard_shape(a.shape) == b.addressable_shards[0].data.shape
    shards = [x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(made)]
    assert arithmetic.size(planned) == sum(shards)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("program", ["prefill", "decode"])
def test_int8_spares_a_byte_or_three_a_weight_for_a_scale_an_output(program, dtype):
    config, mesh = CONFIG, jax.make_mesh((1,), ("device",), devices=jax.devices()[:1])
    layout, model = Layout(mesh, ()), Transformer(config, jnp.dtype(dtype))
    small, moved = quantization.matrices(abstract_params(model), output=True), []
    for which in (None, small):
        of = programs.shapes(layout, 4, 256, dtype, which)
        held = programs.arguments(program, model, layout, of)
        moved.append(arithmetic.moved(program, held, config))
    n, k = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    d, mlp, vocab = config.embed_dim, config.mlp_dim, config.vocab_size
    outputs = config.num_layers * ((n + 2 * k + d) + (2 * mlp + d)) + vocab
    matrices = config.num_layers * (d * (2 * n + 2 * k) + 3 * d * mlp) + vocab * d
    spared = matrices * (jnp.dtype(dtype).itemsize - 1) - 4 * outputs
    assert moved[0] - moved[1] == spared


def test_tensor_parallel_decode_reduces_twice_a_layer():
    """With as many key-value heads as devices, too: two a layer, the lookup, and the logits."""
    config = dataclasses.replace(CONFIG, num_kv_heads=8, num_layers=3)
    *_, compiled = compile_for("tensor", "decode", config=config)
    kinds = collections.Counter(c.kind for c in read(compiled.as_text(), 8) if c.loops)
    assert kinds == {"all-reduce": 2 * 3 + 1, "all-gather": 1}


@pytest.mark.parametrize("name", ["data_tensor", "fsdp", "fsdp_tensor"])
def test_each_device_chooses_the_tokens_of_its_rows_by_itself(name):
    """They ask each other whether any row goes on, once a token, not after each try to draw one."""
    *_, compiled = compile_for(name, "decode")
    flags = [c for c in read(compiled.as_text(), 8) if c.loops and c.dtype == "pred"]
    assert [(c.kind, c.loops) for c in flags] == [("all-reduce", 1)]


@pytest.mark.parametrize(
    ("program", "int8"), [*((p, False) for p in programs.PROGRAMS), ("decode", True)]
)
@pytest.mark.parametrize("name", slow_but("data_tensor", "long"))
def test_what_stays_on_a_device_is_what_its_program_is_given(name, program, int8):
    layout, model, of, compiled = compile_for(name, program, int8=int8)
    held = programs.arguments(program, model, layout, of)
    expected = sum(arithmetic.state_sizes(program, held).values())
    if program == "decode":
        # Of each token its bias, its count, and whether it stands in the prompt or ends the row.
        expected += of.batch * model.config.vocab_size * (4 + 4 + 1 + 1)
    given = compiled.memory_analysis().argument_size_in_bytes
    assert expected <= given < expected + 64 * of.batch * of.length + 4 * of.batch * 1000


@pytest.mark.parametrize(("window", "dilation"), [(None, 1), (5, 1), (5, 3), (None, 4)])
@pytest.mark.parametrize("program", programs.PROGRAMS)
def test_the_model_s_work_is_two_a_weight_and_four_a_pair(program, window, dilation):
    config = dataclasses.replace(CONFIG, sliding_window=window, dilation=dilation)
    of = programs.Shapes(3, 32, jnp.dtype("float32"), 8)
    shapes = abstract_params(Transformer(config))
    layers = sum(math.prod(x.shape) for name in ("layers_0", "layers_1")
                 for x in jax.tree.leaves(shapes[name]) if x.ndim > 1)  # fmt: skip
    output = math.prod(shapes["lm_head"]["kernel"].shape)
    places = np.arange(32)[None]
    seen = np.asarray(visible(places, places, window, dilation))[0].sum(
        axis=1
    )  # keys of each query
    tokens = {"prefill": 3 * 8, "decode": 3, "train": 3 * 32}[program]
    keys = seen[-1] if program == "decode" else seen.mean()
    scored = 3 if program == "prefill" else tokens
    pairs = 2 * tokens * keys * config.num_heads * config.head_dim
    expected = 2 * (tokens * layers + scored * output) + 4 * pairs
    assert arithmetic.tokens(program, of) == tokens
    factor = 3 if program == "train" else 1
    assert arithmetic.flops(program, config, of) == pytest.approx(factor * expected)


@pytest.mark.parametrize("program", programs.PROGRAMS)
def test_the_compiler_counts_the_model_s_work_and_a_little_more(program):
    """On one device; with rows that fill the cache, little is masked."""
    config = dataclasses.replace(CONFIG, embed_dim=256, mlp_dim=768)
    mesh = jax.make_mesh((1,), ("device",), devices=jax.devices()[:1])
    layout = Layout(mesh, ())
    of = programs.shapes(layout, 4, 256, "float32")
    found = forecast.forecast(program, config, layout, of, remat=None)
    assert found.model_flops < found.flops < 1.35 * found.model_flops
    assert found.sent == found.model_sent == 0


HLO = """\
HloModule jit_f

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%cond (s: (s32[], f32[4])) -> pred[] {
  %limit = s32[] constant(6)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %ar = (f32[2,3]{1,0}, /*index=1*/bf16[5]{0}) all-reduce(%x, %y), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %out = (s32[], f32[4]) tuple(%i, %z)
}

%piece (p: bf16[8]) -> bf16[16] {
  ROOT %ag.2 = bf16[16]{0} all-gather(%p), channel_id=2, replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %loop = (s32[], f32[4]) while(%init), condition=%cond, body=%body
  %known = (s32[], f32[4]) while(%init), condition=%cond, body=%body2, backend_config={"known_trip_count":{"n":"3"}}
  %f1 = bf16[16]{0} fusion(%a), kind=kCustom, calls=%piece
  %f2 = bf16[16]{0} fusion(%a), kind=kCustom, calls=%piece
  %start = (bf16[2]{0}, bf16[16]{0}) all-gather-start(%a), channel_id=3, replica_groups=mesh['a'=2,'b'=8] {'b'}, dimensions={0}
  %done = bf16[16]{0} all-gather-done(%start)
  %cp = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%p), channel_id=4, source_target_pairs={{0,1},{1,0}}
  %a2a = (f32[1,2]{1,0}, f32[1,2]{1,0}) all-to-all(%x, %y), channel_id=5, replica_groups=mesh['a'=4,'b'=2], device_ids=([4,2]T(1,0)) {'a':(2)2}, metadata={op_name="jit(f)/take"}
  ROOT %rs = f32[4]{0} reduce-scatter(%x), channel_id=6, replica_groups={}, to_apply=%add
}
"""  # noqa: E501


def test_collectives_are_read_from_hlo_in_all_its_spellings():
    body2 = HLO[HLO.index("%body (") : HLO.index("%piece")].replace("body (", "body2 (")
    body2 = body2.replace("channel_id=1", "channel_id=7")
    found = read(HLO.replace("%piece", body2 + "%piece", 1), 8)
    assert found == [
        Collective("all-reduce", "f32", (2, 3), 24, 4, 6, 1, ""),
        Collective("all-reduce", "bf16", (5,), 10, 4, 6, 1, ""),
        Collective("all-reduce", "f32", (2, 3), 24, 4, 3, 1, ""),
        Collective("all-reduce", "bf16", (5,), 10, 4, 3, 1, ""),
        Collective("all-gather", "bf16", (16,), 32, 2, 1, 0, ""),
        Collective("all-gather", "bf16", (16,), 32, 8, 1, 0, ""),
        Collective("collective-permute", "f32", (4,), 16, 2, 1, 0, ""),
        Collective("all-to-all", "f32", (2, 1, 2), 16, 2, 1, 0, "jit(f)/take"),
        Collective("reduce-scatter", "f32", (4,), 16, 8, 1, 0, ""),
    ]
    assert [collective.sent for collective in found[4:]] == [16, 28, 16, 8, 7 * 16]
    assert found[0].sent == 2 * 24 * 3 / 4


def test_a_fusion_may_sum_a_part_on_each_device():
    fused = """
%all-reduce-scatter.1 (input: f32[4,16]) -> f32[4,2] {
  %all-reduce.9 = f32[4,16]{1,0:T(8,128)} all-reduce(%input), channel_id=9, replica_groups={}, to_apply=%add
  ROOT %slice = f32[4,2]{1,0:T(8,128)S(1)} dynamic-slice(%all-reduce.9, %zero, %start), dynamic_slice_sizes={4,2}
}

ENTRY %main (p: f32[4,16]) -> f32[4,2] {
  ROOT %f = f32[4,2]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
}
"""  # noqa: E501
    (found,) = read(fused, 8)
    assert found == Collective("reduce-scatter", "f32", (4, 2), 32, 8, 1, 0, "")


def test_a_loop_that_xla_has_unrolled_runs_less_often():
    condition = HLO.replace(
        "  ROOT %less", "  %i = s32[] get-tuple-element(%s), index=0\n  ROOT %less"
    )
    body = condition.replace(
        "  ROOT %out = (s32[], f32[4]) tuple(%i, %z)",
        "  %two = s32[]{:T(128)} constant(2)\n  %next = s32[] add(%i, %two)\n"
        "  ROOT %out = (s32[], f32[4]) tuple(%next, %z)",
    )
    assert [read(text, 8)[0].times for text in (HLO, condition, body)] == [6, 6, 3]


def test_hardware_has_every_figure_and_its_source():
    chips = hardware.known()
    assert set(chips) == {"v5e", "v5p", "v6e", "A100", "H100", "H200", "T4", "L4"}
    for chip in chips.values():
        assert min(chip.memory, chip.bandwidth, chip.flops, chip.link) > 1e9
        assert chip.source.startswith("https://")


def test_the_slowest_binds():
    chip = hardware.Hardware("x", 1e9, bandwidth=100, flops=1000, link=10, source="")
    exchange = [Collective("all-gather", "f32", (), 40, 4, times=2, loops=0, source="")]
    found = estimate(chip, flops=3000, moved=200, collectives=exchange)
    assert (found.compute, found.memory, found.exchange) == (3, 2, 6)
    assert (found.seconds, found.serial_seconds, found.binds) == (6, 9, "exchange")
    tiny = [Collective("all-reduce", "f32", (), 0, 8, times=1, loops=0, source="")]
    assert estimate(chip, 0, 0, tiny).exchange == pytest.approx(8e-6)


def command(capsys, *arguments):
    status = plan.main(["nano", *arguments])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.slow
def test_the_command_prints_what_a_reader_asks(capsys):
    layout = "--sharding", "data_tensor", "--devices", "8"
    status, out, _ = command(capsys, *layout, "--hardware", "L4", "--batch", "6", "--length", "512")
    assert status == 0
    assert out.startswith("nano, 8 rows of 512 tokens, bfloat16: data = 4, tensor = 2\n")
    for line in ("it fits", "prefill: a chunk of 4096", "decode: a step of 8", "MFU; "):
        assert line in out
    status, out, _ = command(capsys, *layout, "--train", "--json", "--length", "64")
    (fields,) = map(json.loads, out.splitlines())
    assert (status, fields["program"], fields["tokens"]) == (0, "train", 256)
    assert fields["mesh"] == {"data": 4, "tensor": 2}
    assert fields["optimizer_bytes"] == pytest.approx(2 * fields["weights_bytes"], abs=100)
    assert "fits" not in fields


@pytest.mark.slow
def test_rows_and_lengths_are_filled_up_to_what_devices_share(capsys):
    layout = "--sharding", "long", "--devices", "4", "--train", "--json"
    status, out, _ = command(capsys, *layout, "--length", "61")
    assert (status, json.loads(out)["length"]) == (0, 64)


def test_one_device_needs_no_layout(capsys):
    status, out, _ = command(capsys, "--json", "--length", "64", "--hardware", "T4")
    prefill, decode = map(json.loads, out.splitlines())
    assert status == 0
    assert (prefill["mesh"], prefill["tokens"], decode["tokens"]) == ({"device": 1}, 64, 1)
    assert prefill["fits"]
    assert decode["binds"] == "memory"


@pytest.mark.slow
def test_int8_is_planned_where_it_is_asked_for_or_stored(capsys, tmp_path):
    model, params, _ = checkpoint.load(quantize="int8", dtype="bfloat16")
    checkpoint.save(tmp_path / "x", model.config, params)
    size, found = sum(leaf.nbytes for leaf in jax.tree.leaves(params)), []
    for arguments in (["nano", "--quantize", "int8"], [str(tmp_path / "x")], ["nano"]):
        assert plan.main([*arguments, "--json", "--length", "64"]) == 0
        found.append(json.loads(capsys.readouterr().out.splitlines()[1]))
    asked, stored, plain = found
    assert asked["weights_bytes"] == size
    assert asked | {"model": stored["model"]} == stored
    assert (asked["quantize"], plain["quantize"]) == ("int8", None)
    spared = plain["weights_bytes"] - size
    assert plain["model_moved_bytes"] - asked["model_moved_bytes"] == spared > size / 3
    for arguments in (["nano", "--quantize", "int8"], [str(tmp_path / "x")]):
        assert plan.main([*arguments, "--train"]) == 2
        message = capsys.readouterr().err
        assert message.startswith(f"error: {arguments[0]} is planned with matrices in int8, which")
        assert message.count("\n") == 1
    assert plan.main(["nano", "--quantize", "int8", "--length", "64"]) == 0
    assert ", bfloat16, matrices in int8: device = 1\n" in capsys.readouterr().out


@pytest.mark.slow
def test_a_cache_in_int8_is_planned_as_it_is_made(capsys):
    found = []
    for more in ([], ["--kv-cache-dtype", "int8"]):
        assert plan.main(["nano", "--json", "--batch", "3", "--length", "512", *more]) == 0
        found.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    model, _, _ = checkpoint.load(dtype="bfloat16")
    for (prefill, decode), dtype in zip(found, (None, "int8"), strict=True):
        assert prefill["kv_cache_dtype"] == decode["kv_cache_dtype"] == dtype
        assert prefill["weights_bytes"] == found[0][0]["weights_bytes"]
        made = empty_cache(model.clone(kv_cache_dtype=dtype), 4, 512)  # as 3 rows have
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(made))
        assert prefill["cache_bytes"] == decode["cache_bytes"] == size
    spared = found[0][1]["cache_bytes"] - found[1][1]["cache_bytes"]
    assert found[0][1]["model_moved_bytes"] - found[1][1]["model_moved_bytes"] == spared > 0
    assert plan.main(["nano", "--kv-cache-dtype", "int8", "--length", "64"]) == 0
    assert ", bfloat16, cache in int8: device = 1\n" in capsys.readouterr().out


def test_the_documents_tell_what_7b_takes_of_16_gb():
    """The table's figures, but for the compiler's temporaries, and the T4's in installation.md."""
    text = (CHECKOUT / "docs" / "scaling.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"## Mistral 7B on one chip of 16 GB\n(.*?)\n## ", text, re.DOTALL)
    rows = re.findall(
        r"^\| (v5e|T4) \| (\w+)(, cache too)? \| (\d+) x ([\d,]+) \| (.*) \|$",
        section,
        re.MULTILINE,
    )
    config = ModelConfig.from_name("mistral-7b-v0.3")
    layout = Layout(jax.make_mesh((1,), ("device",), devices=jax.devices()[:1]), ())
    assert len(rows) == 13
    left = {}
    for name, kind, cache, batch, length, rest in rows:
        chip, dtype = hardware.known()[name], {"v5e": "bfloat16", "T4": "float16"}[name]
        assert kind in (dtype, "int8")
        model = Transformer(config, jnp.dtype(dtype), kv_cache_dtype="int8" if cache else None)
        small = quantization.matrices(abstract_params(model), output=True) if kind == "int8" else {}
        of = programs.shapes(layout, int(batch), int(length.replace(",", "")), dtype, small)
        held = programs.arguments("decode", model, layout, of)
        sizes = arithmetic.state_sizes("decode", held)
        spare = chip.memory - sum(sizes.values())
        moved = arithmetic.moved("decode", held, config)
        flops = arithmetic.flops("decode", config, of)
        rate = of.batch / estimate(chip, flops, moved, []).seconds
        told = [cell.strip() for cell in rest.split("|")]
        left[name, kind + cache, of.batch, of.length] = f"{spare / 1e9:.1f} GB"
        expected = [f"{size / 1e9:.1f} GB" for size in sizes.values()]
        assert told[:3] == [*expected, f"{spare / 1e9:.1f} GB" if spare > 0 else "none"]
        assert told[5] == ("" if told[4] == "no" else f"{rate:,.0f}")
    short, long = (left["T4", "int8", 1, length] for length in (4096, 32768))
    told = f"{short} left beside a row of 4,096 tokens, {long} beside one of 32,768"
    assert told in (CHECKOUT / "docs" / "installation.md").read_text(encoding="utf-8")


def test_what_fits_is_certain_or_said_not_to_be(capsys):
    compiled = forecast.Forecast(
        "decode", 1, {"weights": 60, "cache": 20}, 30, 0, 0, 0, 0, [], 0, None
    )
    for memory, own, other in ((120, True, True), (100, True, None), (70, True, False)):
        assert compiled.fits(memory, own_compiler=True) is own
        assert compiled.fits(memory, own_compiler=False) is other
    refused = dataclasses.replace(compiled, refusal="Ran out of memory")
    assert refused.fits(1000, own_compiler=True) is refused.fits(1000, own_compiler=False) is False
    chip = dataclasses.replace(hardware.known()["L4"], memory=100)
    estimated = dataclasses.replace(compiled, estimate=estimate(chip, 1, 1, []))
    told = "\n".join(report.lines([estimated], chip, False))
    assert "80 bytes of 100 bytes beside the temporaries: they decide whether it" in told
    assert "fits. Those above are a CPU's" in told


def test_a_program_that_the_compiler_refuses_does_not_fit(capsys, monkeypatch):
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory (53.57G)\nmore")

    monkeypatch.setattr(programs, "lower", lambda *_: Lowered())
    status, out, _ = command(capsys, "--hardware", "T4", "--length", "64")
    assert status == 0
    assert "the compiler refuses prefill: Ran out of memory (53.57G)\n" in out
    assert "IT DOES NOT FIT" in out
    _, out, _ = command(capsys, "--hardware", "T4", "--length", "64", "--json")
    assert not json.loads(out.splitlines()[0])["fits"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hardware", "v4"], "no hardware 'v4'; expected one of v5e, v5p"),
        (["--train", "--kv-cache-dtype", "int8"], "--kv-cache-dtype is for generation: training"),
        (["--batch", "0"], "--batch is 0; expected at least 1"),
        (["--sharding", "tensor"], "say how many with --devices or --mesh"),
        (["--devices", "4"], "--devices is 4; name the --sharding that uses them"),
        (["--sharding", "fsdp", "--devices", "9"], "uses 8 devices already, 9 are planned for"),
        (["--sharding", "tensor", "--devices", "3"], "use a tensor axis of 2 (--mesh tensor=2)"),
        (["--compiler", "tpu"], "has no slice of 1 chips; it has none: name a TPU"),
        (
            ["--compiler", "tpu", "--hardware", "v5e", "--devices", "3", "--sharding", "fsdp"],
            "it has 1, 4, 8, 16, 32, 64",
        ),
    ],
)
def test_what_cannot_be_planned_is_one_line(capsys, arguments, message):
    status, out, err = command(capsys, *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_program_that_jaxlib_cannot_read_names_the_libtpu_to_install():
    class Compiled:
        def as_text(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure\nmore")

    with pytest.raises(
        ValueError, match=r"\(INTERNAL: RET_CHECK failure\); .*tpu-compiler"
    ) as error:
        forecast.text_of(Compiled())
    assert "\n" not in str(error.value)


def test_a_compiler_that_is_not_there_is_named(capsys, monkeypatch):
    from jax.experimental import topologies

    def absent(**_):
        raise RuntimeError("Unable to initialize backend\nmore")

    monkeypatch.setattr(topologies, "get_topology_desc", absent)
    status, _, err = command(capsys, "--hardware", "v5e", "--compiler", "tpu")
    assert status == 2
    assert err == (
        "error: there is no compiler for a v5e slice of 1x1 (Unable to initialize backend): pip "
        "install 'mistral-jax-flax[tpu-compiler]', or plan with --compiler cpu\n"
    )


@pytest.mark.slow
def test_a_checkpoint_or_a_file_names_the_model(capsys):
    for model in ("mistral_jax/assets/nano", "configs/models/nano.toml"):
        path = CONFIG_DIR.parent / model
        assert plan.main([str(path), "--json", "--length", "64", "--train"]) == 0
        assert json.loads(capsys.readouterr().out)["weights_bytes"] > 1e7


@pytest.mark.slow
def test_more_devices_than_there_are():
    """256 of them, for a program that is compiled whole."""
    arguments = "nano", "--sharding", "fsdp", "--devices", "256", "--batch", "256", "--length", "64"
    (end,) = together("-m", "mistral_jax.plan", *arguments, "--json", count=1, devices=1)
    assert end.status == 0, end.err
    prefill, decode = map(json.loads, end.out.splitlines())
    assert prefill["mesh"] == {"fsdp": 256}
    assert decode["collectives"]["all-gather"][0] > 7 * 4
