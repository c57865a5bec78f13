"""An exported COMI computes the same in PyTorch: the replay of launch/, and adapters for PEFT."""

import importlib.util
import json

import numpy as np
import pytest
import train_fixtures
from convert_fixtures import (
    KINDS,
    ROOT,
    batch_of,
    command,
    import_hf,
    import_official,
    language_model,
    official_file,
    remember_and_score,
)
from safetensors.numpy import load_file

from comi_jax import Comi
from comi_jax.config import Generation
from comi_jax.model import comi, generate

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def replay():
    spec = importlib.util.spec_from_file_location("replay_pytorch", ROOT / "launch" / "replay_pytorch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_pytorch_replays_the_whole_pipeline(kind, replay, tmp_path):
    file, _, arch = official_file(tmp_path / "theirs", kind, 2 * kind.startswith("qwen"))
    ours = import_official(file, language_model(tmp_path / "lm", kind), tmp_path / "comi")
    command("export-hf", f"--checkpoint={ours}", f"--output={tmp_path / 'out'}")
    theirs, model = replay.load(tmp_path / "out"), Comi.load(ours)
    rng = np.random.default_rng(2)
    context, query = rng.integers(3, 60, 37), rng.integers(3, 60, 5)  # segments of 16, 16 and 5 tokens
    memory, logits = remember_and_score(model.params, batch_of(context, query), model.architecture)
    with torch.no_grad():
        want = replay.remember(theirs, torch.from_numpy(context), torch.from_numpy(query), 2)
        prompt = torch.cat([want, theirs.decoder.get_input_embeddings()(torch.from_numpy(query))])[None]
        want_logits = theirs.decoder(inputs_embeds=prompt).logits[:, -1:].numpy()
        ids = theirs.decoder.generate(inputs_embeds=prompt, max_new_tokens=12, do_sample=False)[0].tolist()
    want = want.numpy()
    found = np.asarray(memory.vectors[0, : int(memory.length[0])])
    assert found.shape == want.shape
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-4 * np.abs(want).max())
    np.testing.assert_allclose(logits, want_logits, rtol=0, atol=1e-4 * np.abs(want_logits).max())
    prompt = comi.prompt(model.params, model.architecture, memory, batch_of(context, query))
    options = Generation(max_new_tokens=12)
    out = generate.greedy(model.params, model.architecture, prompt.rows, prompt.length, options, model.run.stop)
    assert out.ids[0, : int(out.length[0])].tolist() == ids


def test_pytorch_answers_a_batch_as_one_at_a_time(replay, tmp_path):
    """Contexts and questions of unlike lengths: rows are padded on the left."""
    lm = train_fixtures.language_model(tmp_path / "lm")
    command("import-hf", f"--backbone={lm}", f"--output={tmp_path / 'comi'}", "--encoder-layers=1", "--rates=2")
    command("export-hf", f"--checkpoint={tmp_path / 'comi'}", f"--output={tmp_path / 'out'}")
    model = replay.load(tmp_path / "out")
    rows = [(" ".join(row["input"][: i + 1]), row["prompt"]) for i, row in enumerate(train_fixtures.records(3))]
    contexts, questions = zip(*rows, strict=True)
    together, memories = replay.answer(model, contexts, questions, max_new_tokens=8)
    assert len({len(memory) for memory in memories}) == 3
    for ids, context, question in zip(together, contexts, questions, strict=True):
        (alone,), _ = replay.answer(model, [context], [question], max_new_tokens=8)
        assert ids[: len(alone)].tolist() == alone.tolist()
    found = Comi.load(tmp_path / "comi").answer(contexts[2], questions[2], max_new_tokens=8).tokens
    assert together[2].tolist()[: len(found)] == list(found)


def test_adapters_for_peft_are_those_that_the_other_export_merges(tmp_path):
    """W + (lora_alpha / r) B A, as PEFT computes it, of the unmerged decoder and its adapter: the merged decoder."""
    file, _, _ = official_file(tmp_path / "theirs", "qwen2", 2)
    ours = import_official(file, language_model(tmp_path / "lm", "qwen2"), tmp_path / "comi")
    command("export-hf", f"--checkpoint={ours}", f"--output={tmp_path / 'merged'}")
    command("export-hf", f"--checkpoint={ours}", f"--output={tmp_path / 'apart'}", "--adapter")
    merged, base = (load_file(tmp_path / name / "decoder" / "model.safetensors") for name in ("merged", "apart"))
    adapter = load_file(tmp_path / "apart" / "adapter" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "apart" / "adapter" / "adapter_config.json").read_text())
    adapted = 0
    for name, weight in base.items():
        a, b = (f"base_model.model.{name.removesuffix('weight')}lora_{part}.weight" for part in "AB")
        if a in adapter:
            adapted += 1
            assert name.split(".")[-2] in config["target_modules"] and adapter[a].shape[0] == config["r"]
            weight = weight + config["lora_alpha"] / config["r"] * adapter[b] @ adapter[a]
        np.testing.assert_allclose(weight, merged[name], rtol=0, atol=1e-6)
    assert len(adapter) == 2 * adapted > 0
    plain = import_hf(language_model(tmp_path / "other", "qwen2"), tmp_path / "plain")
    with pytest.raises(SystemExit, match="has no adapters"):
        command("export-hf", f"--checkpoint={plain}", f"--output={tmp_path / 'none'}", "--adapter")
    assert not (tmp_path / "none").exists()


def test_the_replay_is_short_enough_to_be_documentation():
    assert len((ROOT / "launch" / "replay_pytorch.py").read_text().splitlines()) < 150
