"""One name for a model, whatever form it is in."""

import sources
from mistral_jax.convert.prepare import prepare

from mistral_jax import checkpoint, manifest


def test_what_is_ready_is_left_as_it_is():
    assert prepare(None) is None
    assert prepare(str(checkpoint.BUNDLED)) == checkpoint.BUNDLED


def test_what_is_not_is_converted_once(tmp_path, capsys):
    source = tmp_path / "tiny"
    sources.write(source, "hf-safetensors")
    made = prepare(f"{source}/", tmp_path / "checkpoints")
    assert made == tmp_path / "checkpoints" / "tiny"
    assert manifest.read(made)[1]["source_format"] == "hf-safetensors"
    assert capsys.readouterr().err, "a conversion shows its progress"
    before = (made / "config.json").stat().st_mtime_ns
    assert prepare(source, tmp_path / "checkpoints") == made
    assert (made / "config.json").stat().st_mtime_ns == before
    assert not capsys.readouterr().err
