"""What must hold of every architecture of the registry: the logits of transformers, however a prompt is cut, beside
whatever else, on two ranks; and each number of a config counts."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from cableway.ipc.modelfiles import ModelError
from cableway.kernels import compilation
from cableway.workers import models
from cableway.workers.rehearsal import rehearse
from tests.checkpoints import SIZES, random_model, save
from tests.models.assembled import REWRITTEN, WITHIN
from tests.models.harness import Session, load, logits_of, prompt, source_of
from tests.models.ranks import Ranks
from tests.models.zoo import ATTENTION, IGNORED, OLDER, TOLERANCES, UNUSED, ZOO
from tests.workers.running import worker_config
from tests.workers.test_rehearsal import AbsentGpu

TOLERANCE = 1e-4
NUM_TOKENS = 40
EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
VARIANTS = [(name, index) for name, variants in ZOO.items() for index in range(len(variants))]
VARIANTS += [(name, 0) for name in REWRITTEN if name not in WITHIN]
NAMES = list(dict.fromkeys(name for name, _ in VARIANTS))
each_variant = pytest.mark.parametrize(("name", "index"), VARIANTS, ids=lambda value: str(value))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(architecture, variant) -> its checkpoint, and transformers' logits of a prompt."""

    @functools.cache
    def made(name: str, index: int) -> tuple[Path, Tensor]:
        rewritten = REWRITTEN.get(name)
        model = oracle(rewritten.relative, rewritten.fields) if rewritten else oracle(name, ZOO[name][index])
        if rewritten:
            rewritten.prepare(model)
        folder = save(model, tmp_path_factory.mktemp(name))
        if rewritten:
            rewritten.rewrite(name, folder)
        return folder, their_logits(model, **(rewritten.call if rewritten else {}))

    return made


def their_logits(model: Any, **more: Any) -> Tensor:
    """transformers' logits [T, vocab] of a prompt."""
    ids = prompt(NUM_TOKENS)[None] % model.config.vocab_size
    if model.config.is_encoder_decoder:
        ids, more = source_of(ids[0])[None], {"decoder_input_ids": ids, **more}
    with torch.inference_mode():
        if not getattr(model.config, "is_moe", False):
            return model(ids, **more).logits[0]
        logits, cache = [], transformers.DynamicCache(config=model.config)  # Doge, which mixes up several
        for token in ids.split(1, 1):
            logits.append(model(token, past_key_values=cache, use_cache=True).logits[0])
        return torch.cat(logits)


def oracle(name: str, variant: dict[str, Any]) -> Any:
    """A random model of transformers' class of that name."""
    model_class = getattr(transformers, name)
    config_class = model_class.config_class
    known = config_class().to_dict().keys() | config_class.attribute_map.keys()
    fields = {**SIZES, **dict.fromkeys(EPSILONS, 0.02)}
    fields = {key: value for key, value in fields.items() if key in known} | variant
    return random_model(model_class, fields, attention=ATTENTION.get(name, "eager"))


def ids_of(expected: Tensor) -> Tensor:
    return prompt(NUM_TOKENS) % expected.shape[1]


def close(actual: Tensor, expected: Tensor, name: str) -> None:
    torch.testing.assert_close(actual, expected, atol=TOLERANCES.get(name, TOLERANCE), rtol=0)


def test_what_is_said_of_each_architecture_is_what_is_tested() -> None:
    said = {architecture.name: architecture.verified for architecture in models.architectures()}
    tested = dict.fromkeys(ZOO, models.registry.TRANSFORMERS)
    tested |= {name: models.registry.relative(rewritten.kin) for name, rewritten in REWRITTEN.items()}
    assert {name: how for name, how in said.items() if how != models.registry.UNVERIFIED} == tested


@each_variant
def test_logits_are_those_of_transformers(folders: Any, name: str, index: int) -> None:
    folder, expected = folders(name, index)
    assert 0.05 < expected.std() < 20, expected.std()
    close(logits_of(load(folder, max_model_len=NUM_TOKENS), ids_of(expected)), expected, name)


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_values_can_be_kept_in_8_bits(folders: Any, name: str) -> None:
    """But those of latents; and whatever else a family keeps stays as it is. The median, as experts may change."""
    folder, expected = folders(name, 0)
    model, ids = load(folder, max_model_len=NUM_TOKENS), ids_of(expected)
    if any(group.kind == "latent" for group in model.state_groups()):
        with pytest.raises(ModelError, match="latents"):
            logits_of(model, ids, dtype=torch.int8)
    else:
        expected, actual = expected.log_softmax(-1), logits_of(model, ids, dtype=torch.int8).log_softmax(-1)
        assert (expected.exp() * (expected - actual)).sum(-1).median() < 5e-3


@pytest.mark.parametrize("name", WITHIN)
def test_the_text_of_models_of_more_is_that_of_its_family(folders: Any, name: str) -> None:
    folder, expected = folders(name, 0)
    close(logits_of(load(folder, max_model_len=NUM_TOKENS), ids_of(expected)), expected, name)


def older(config: dict[str, Any]) -> dict[str, Any]:
    """A config as files before transformers 5 put it: rope_theta and partial_rotary_factor by themselves, the rest of
    the rotation as rope_scaling, with its kind as `type`."""
    rope = dict(config["rope_parameters"])
    loose = {key: rope.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    scaling = {"type": rope.pop("rope_type"), **rope}
    scaling = None if scaling["type"] == "default" else scaling
    rest = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype")}
    return {**rest, **loose, "rope_scaling": scaling, "torch_dtype": "float32"}


@each_variant
def test_configs_of_older_checkpoints_mean_the_same(folders: Any, name: str, index: int) -> None:
    folder, expected = folders(name, index)
    path = folder / "config.json"
    text = path.read_text()
    config = json.loads(text)
    if "rope_type" not in config.get("rope_parameters", {}):
        pytest.skip("a config without the newer spelling")
    try:
        path.write_text(json.dumps(older(config)))
        close(logits_of(load(folder, max_model_len=NUM_TOKENS), ids_of(expected)), expected, name)
    finally:
        path.write_text(text)


@each_variant
def test_chunks_beside_other_sequences_give_the_logits_of_one_go(folders: Any, name: str, index: int) -> None:
    folder, expected = folders(name, index)
    a, b = ids_of(expected), ids_of(expected).flip(0)[:23]
    model = load(folder, max_model_len=NUM_TOKENS)
    session = Session(model, num_seqs=2)
    if model.has_encoder:
        session.encode([(1, source_of(b)), (0, source_of(a))])
    steps = [[(0, a[:17])], [(1, b[:5]), (0, a[17:18])], [(0, a[18:33]), (1, b[5:22])], [(1, b[22:]), (0, a[33:])]]
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for chunks in steps:
        for (sequence, _), logits in zip(chunks, session.step(chunks), strict=True):
            parts[sequence].append(logits)
    close(torch.cat(parts[0]), expected, name)
    close(torch.cat(parts[1]), logits_of(model, b), name)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.stop()


@each_variant
def test_two_ranks_compute_what_one_does(two_ranks: Ranks, folders: Any, name: str, index: int) -> None:
    folder, expected = folders(name, index)
    try:
        computed = two_ranks.logits(folder, ids_of(expected), max_model_len=NUM_TOKENS)
    except RuntimeError as error:
        if "cannot be split" not in str(error):
            raise
        pytest.skip("sizes that cannot be dealt out")
    for logits in computed:
        close(logits, expected, name)


def test_layers_that_predict_further_tokens_are_skipped(tmp_path: Path) -> None:
    model = oracle("DeepseekV3ForCausalLM", ZOO["DeepseekV3ForCausalLM"][0])
    folder = save(model, tmp_path)
    before = logits_of(load(folder), prompt())
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.layers.3.eh_proj.weight": torch.zeros(3)}, folder / "model.safetensors")
    assert json.loads((folder / "config.json").read_text())["num_nextn_predict_layers"] == 1
    assert torch.equal(logits_of(load(folder), prompt()), before)


def test_later_t5_has_a_head_of_its_own(tmp_path: Path) -> None:
    """Which transformers ties again when it makes a model anew."""
    folder = save(oracle("T5ForConditionalGeneration", ZOO["T5ForConditionalGeneration"][0]), tmp_path)
    before = logits_of(load(folder), prompt())
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "lm_head.weight": 3 * tensors["shared.weight"]}, folder / "model.safetensors")
    assert torch.equal(logits_of(load(folder), prompt()), before)
    config = json.loads((folder / "config.json").read_text())
    del config["scale_decoder_outputs"]
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    torch.testing.assert_close(logits_of(load(folder), prompt()), 3 * 64**0.5 * before)


@pytest.mark.parametrize("name", NAMES)
def test_an_outline_goes_through_every_kind_of_step(folders: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: each kernel of a step has a form there, and nothing waits for the device."""
    triton = pytest.importorskip("triton")
    launched = set()
    monkeypatch.setattr(triton.runtime.JITFunction, "run", lambda function, *_, **__: launched.add(function.__name__))
    monkeypatch.setattr(triton.runtime.driver, "_active", AbsentGpu())
    config = worker_config(folders(name, 0)[0], max_model_len=64, max_num_seqs=3, max_num_batched_tokens=64)
    with torch.inference_mode(), compilation.ahead():
        rehearse(config)
    assert launched & {"_paged_decode", "_latent_attention", "_state_scan", "_channel_scan", "_wkv_scan"}


def numbers(config: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of all numbers and switches of a config."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from numbers(value, (*path, key))
        elif isinstance(value, int | float):
            yield (*path, key)


def flipped(config: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """The config with another value there."""
    key, *rest = path
    value = config[key]
    if rest:
        return {**config, key: flipped(value, tuple(rest))}
    if isinstance(value, bool):
        return {**config, key: not value}
    return {**config, key: value * 2 if isinstance(value, int) else value * 1.5 if value < 0.6 else value * 0.7}


def used_numbers(folder: Path, name: str) -> set[tuple[str, ...]]:
    """Paths of the numbers of a config that count."""
    unused, dropped = IGNORED | UNUSED.get(name, set()), OLDER.get(name, ())
    config = json.loads((folder / "config.json").read_text())
    return {path for path in numbers(config) if path[-1] not in unused and path[0] not in dropped}


def unseen(folder: Path, expected: Tensor, name: str, asked: set[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """Those of the numbers asked for that could be any other."""
    path = folder / "config.json"
    text, found = path.read_text(), set()
    config = {key: value for key, value in json.loads(text).items() if key not in OLDER.get(name, ())}
    try:
        path.write_text(json.dumps(config))
        right = logits_of(load(folder, max_model_len=NUM_TOKENS), ids_of(expected))
        for keys in sorted(asked):
            path.write_text(json.dumps(flipped(config, keys)))
            try:
                wrong = logits_of(load(folder, max_model_len=NUM_TOKENS), ids_of(expected))
            except ModelError:
                continue
            if (wrong - right).abs().max() < 10 * TOLERANCE:
                found.add(keys)
    finally:
        path.write_text(text)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_number_of_the_config_is_seen(folders: Any, name: str) -> None:
    left = used_numbers(folders(name, 0)[0], name)
    for index in range(len(ZOO.get(name, "1"))):  # one variant that shows it is enough
        folder, expected = folders(name, index)
        left = unseen(folder, expected, name, left & used_numbers(folder, name))
    assert not left
