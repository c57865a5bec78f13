"""``convert inspect`` says what a path holds, and what it lacks."""

import jax
import numpy as np
from convert_fixtures import command, import_hf, language_model, official_file, refusal, tensors_of
from safetensors.numpy import load_file, save_file

from comi_jax import Comi
from comi_jax.weights import inspection


def test_inspect_says_what_a_path_is(tmp_path, capsys):
    lm = language_model(tmp_path / "lm", "qwen3", "bfloat16")
    ours = import_hf(lm, tmp_path / "comi")
    command("export-hf", f"--checkpoint={ours}", f"--output={tmp_path / 'out'}")
    file, tensors, _ = official_file(tmp_path / "theirs", "qwen3", 2)
    kinds = {
        lm: "Hugging Face causal language model",
        ours: "COMI checkpoint of config 'import-hf', imported",
        tmp_path / "out": "COMI exported for Hugging Face",
        tmp_path / "out" / "lsa": "Hugging Face model without a head",
        file: "official COMI state dict",
        lm / "model.safetensors": "weights without a config.json (model.safetensors)",
    }
    found = {path: inspection.inspect(path) for path in kinds}
    assert {path: one.kind for path, one in found.items()} == kinds
    sizes = {path: sum(part.parameters for part in one.parts) for path, one in found.items()}
    assert sizes[lm] == sum(tensor.size for tensor in tensors_of(lm).values())
    assert sizes[file] == sum(tensor.size for tensor in tensors.values())
    assert sizes[ours] == sum(np.size(x) for x in Comi.load(ours).params["mig"].values()) + sum(
        leaf.size for part in ("encoder", "lsa", "decoder") for leaf in jax.tree.leaves(Comi.load(ours).params[part])
    )
    assert {part.name for part in found[ours].parts} == {"encoder", "lsa", "decoder", "mig"}
    assert {part.dtypes for part in found[lm].parts} == {("bfloat16",)}
    assert not any(one.missing for path, one in found.items() if path != lm / "model.safetensors")
    assert "3 layers, width 32, 4 heads over 2 key/value heads of 12" in found[ours].architecture
    assert "LoRA of rank 2" in found[file].architecture
    command("inspect", ours)
    assert "nothing is missing" in capsys.readouterr().out


def test_inspect_lists_what_is_missing(tmp_path, capsys):
    lm = language_model(tmp_path / "lm", "llama2")
    tensors = load_file(lm / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, lm / "model.safetensors")
    command("inspect", lm)
    assert "missing:\n  model.norm.weight (32,)" in capsys.readouterr().out
    assert "does not exist" in refusal("inspect", tmp_path / "nowhere")
    file, tensors, _ = official_file(tmp_path / "theirs", "qwen2", 2)
    gone = [
        "beta_merge", "encoder.model.norm.weight", "encoder.model.layers.1.mlp.up_proj.weight",
        "decoder.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight",
    ]  # fmt: skip
    save_file({name: tensor for name, tensor in tensors.items() if name not in gone}, file)
    assert sorted(inspection.inspect(file).missing) == sorted(gone)
