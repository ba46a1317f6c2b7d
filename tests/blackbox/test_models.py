"""Local weights: read without running code, compared with their architecture before a run, every change noted."""

from __future__ import annotations

import argparse
import json
import logging
import pickle
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from methods.base import Access, TextPrompts
from pipeline.blackbox import architecture, facts
from pipeline.blackbox import model as models
from pipeline.blackbox.checkpoint_files import read_weights
from pipeline.blackbox.endpoint import Endpoint
from pipeline.blackbox.facts import describe, load_network
from pipeline.cards import ModelCard
from pipeline.cli import main
from pipeline.config.card_files import model_card
from pipeline.errors import ConfigError, DataError, EndpointRefused, shortened
from pipeline.trials.plan import announcements, make_plan
from pipeline.trials.rows import spec_columns
from tests.support.lab import Lab

State = dict[str, Tensor]
TOWER = {"width": 32, "heads": 1, "layers": 1, "context_length": 12}
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 32},
    "text_cfg": TOWER,
}
CONFIGS = {
    "small": CONFIG,
    "small-quickgelu": CONFIG | {"quick_gelu": True},
    "small-custom": CONFIG | {"custom_text": True},
    "small-siglip-loss": CONFIG | {"init_logit_bias": -10},
    "small-rn": CONFIG | {"vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32}},
    "small-other": CONFIG | {"vision_cfg": CONFIG["vision_cfg"] | {"width": 64}},  # type: ignore[operator]
}


@pytest.fixture(scope="module", autouse=True)
def architectures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Small architectures in open_clip's list, for this module only."""
    folder, paths = tmp_path_factory.mktemp("architectures"), open_clip.factory._MODEL_CONFIG_PATHS
    before = list(paths)
    for name, config in CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    yield
    paths[:] = before
    for name in CONFIGS:
        open_clip.factory._MODEL_CONFIGS.pop(name, None)


def random_state(arch: str = "small") -> State:
    torch.manual_seed(1)
    logging.disable(logging.WARNING)
    net = open_clip.create_model(arch)
    logging.disable(logging.NOTSET)
    return {
        key: value + 0.1 * torch.rand_like(value) if value.is_floating_point() else value
        for key, value in net.state_dict().items()
    }


@pytest.fixture(scope="module")
def state(architectures: None) -> State:
    return random_state()


def card_of(path: Path, arch: str = "small", **keys: Any) -> ModelCard:
    return ModelCard(name="own", kind="open_clip", arch=arch, weights=str(path), **keys)


def loaded(card: ModelCard) -> State:
    return dict(load_network(card, torch.device("cpu"))[0].state_dict())


def saved(state: Any, path: Path) -> Path:
    torch.save(state, path)
    return path


# --- files that are read -------------------------------------------------------------------------------------------


def traced(state: State, path: Path) -> Path:
    """A TorchScript archive as OpenAI's: a traced network with three numbers among its buffers."""
    net = open_clip.CLIP(**CONFIG)
    net.load_state_dict(state)
    for name, number in {"input_resolution": 32, "context_length": 12, "vocab_size": 49408}.items():
        if hasattr(net, name):
            delattr(net, name)
        net.register_buffer(name, torch.tensor(number))
    inputs = {"encode_image": torch.ones(1, 3, 32, 32), "encode_text": torch.zeros(1, 12, dtype=torch.long)}
    torch.jit.save(torch.jit.trace_module(net.eval(), inputs, check_trace=False), path)
    return path


def training(state: State) -> dict[str, Any]:
    """What a training script saves: distributed keys, an optimizer, a NumPy number and its settings."""
    return {
        "epoch": 3,
        "state_dict": {f"module.{key}": value for key, value in state.items()},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []},
        "best": np.float64(71.5),
        "args": argparse.Namespace(lr=0.1),
    }


def as_safetensors(state: State, path: Path) -> Path:
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    return path


WRITERS: dict[str, tuple[Callable[[State, Path], Path], list[str]]] = {
    "state_dict": (saved, []),
    "before_torch_1.6": (lambda s, p: (torch.save(s, p, _use_new_zipfile_serialization=False), p)[1], []),
    "training": (
        lambda s, p: saved(training(s), p),
        ["entry 'state_dict', without epoch, optimizer", "removed 'module.'"],
    ),
    "one_entry": (lambda s, p: saved({"model": s, "step": 4}, p), ["entry 'model', without step"]),
    "compiled": (lambda s, p: saved({f"_orig_mod.{k}": v for k, v in s.items()}, p), ["removed '_orig_mod.'"]),
    "extra_numbers": (lambda s, p: saved({**s, "step": 4}, p), ["skipped 1 entries that are no tensors: step"]),
    "safetensors_named_pt": (as_safetensors, []),
    "torchscript": (traced, ["TorchScript archive", "skipped input_resolution", "skipped attn_mask"]),
}


@pytest.mark.parametrize("kind", list(WRITERS))
def test_a_file_of_this_kind_gives_its_weights_and_notes_what_was_left_out(
    kind: str, state: State, tmp_path: Path
) -> None:
    write, phrases = WRITERS[kind]
    card = card_of(write(state, tmp_path / "w.pt"), quick_gelu=False)
    known = describe(card)
    assert len(known.notes) >= len(phrases)
    for phrase in phrases:
        assert any(phrase in note for note in known.notes), known.notes
        assert phrase in known.identity
    found = loaded(known.card)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_headers_alone_tell_the_same_as_the_values(state: State, tmp_path: Path) -> None:
    for kind, (write, _) in WRITERS.items():
        path = write(state, tmp_path / kind)
        values, headers = read_weights(path), read_weights(path, values=False)
        assert values.notes == headers.notes and values.openai == headers.openai == (kind == "torchscript")
        described = {key: (value.shape, value.dtype) for key, value in values.tensors.items()}
        assert {key: (value.shape, value.dtype) for key, value in headers.tensors.items()} == described
        assert all(value.is_meta for value in headers.tensors.values())


class Harmful:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_torchscript_archive_that_would_run_code_runs_none(tmp_path: Path) -> None:
    trace, path = tmp_path / "it_ran", tmp_path / "w.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w/data.pkl", pickle.dumps(Harmful(trace), protocol=2))
        archive.writestr("w/constants.pkl", b"")
    with pytest.raises(DataError, match=r"cannot be read without running its code .*torch.jit.load\('w.pt'\)"):
        describe(card_of(path))
    assert not trace.exists()


def test_a_torchscript_tensor_cannot_reach_beyond_its_storage(state: State, tmp_path: Path) -> None:
    whole, cut = traced(state, tmp_path / "w.pt"), tmp_path / "cut.pt"
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(cut, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, content[:64] if name.endswith("data/0") else content)
    with pytest.raises(DataError, match="cannot be read"):
        load_network(card_of(cut, quick_gelu=False), torch.device("cpu"))


# --- files that are refused ----------------------------------------------------------------------------------------


def half_of(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def written(content: bytes) -> Callable[[State, Path], Path]:
    def write(_: State, path: Path) -> Path:
        path.write_bytes(content)
        return path

    return write


def renamed(prefix: str) -> Callable[[State, Path], Path]:
    return lambda state, path: saved({prefix + key: value for key, value in state.items()}, path)


def flipped(path: Path) -> Path:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    return path


def bomb(path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data.pkl", bytes(50_000_000))
    return path


REFUSED: dict[str, tuple[Callable[[State, Path], Path], str]] = {
    "empty": (written(b""), "is empty"),
    "web_page": (written(b"\n<!DOCTYPE html><html>Sign in"), "is a web page"),
    "error_page": (written(b"<?xml version='1.0'?><Error>AccessDenied</Error>"), "is a web page"),
    "git_lfs": (written(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"), "git lfs pull"),
    "json": (written(b'{"embed_dim": 512}'), "is JSON text"),
    "gzip": (written(b"\x1f\x8b\x08rest"), "compressed by gzip"),
    "numpy": (written(b"\x93NUMPY\x01\x00"), "is a NumPy array"),
    "garbage": (written(b"not weights at all"), "damaged or no PyTorch file"),
    "cut_zip": (lambda s, p: half_of(saved(s, p)), "cut off or damaged"),
    "cut_legacy": (lambda s, p: half_of(WRITERS["before_torch_1.6"][0](s, p)), "damaged or no PyTorch file"),
    "cut_safetensors": (lambda s, p: half_of(as_safetensors(s, p)), "not a whole safetensors file"),
    "safetensors_header": (
        written(b"\x10\0\0\0\0\0\0\0" + b'{"a": {"dtype": "F32"' + b" " * 99),
        "not a whole safetensors",
    ),
    "whole_model": (lambda s, p: saved(torch.nn.Linear(2, 2), p), "objects of torch.nn.modules.linear.Linear"),
    "a_list": (lambda s, p: saved([s], p), "holds list, not a state dict"),
    "no_tensors": (lambda s, p: saved({"epoch": 3}, p), "holds no tensors (epoch)"),
    "two": (lambda s, p: saved({"model": s, "model_ema": s}, p), "several state dicts (model, model_ema)"),
    "transformers": (renamed("text_model.encoder."), "keys look like transformers' CLIPModel"),
    "lora": (renamed("base_model.model.lora_A."), "merge them into the model"),
    "lightning": (renamed("model."), "all keys begin with 'model.': remove it"),
    "prompt": (lambda s, p: saved({"prompt_learner.ctx": torch.zeros(4, 32)}, p), "a learned prompt (CoOp)"),
    "image_tower": (lambda s, p: saved({k: v for k, v in s.items() if k.startswith("visual")}, p), "keys are missing"),
    "one_key_less": (lambda s, p: saved({k: s[k] for k in list(s)[1:]}, p), "1 of small's"),
    "other_shape": (lambda s, p: saved(random_state("small-other"), p), "have another shape"),
    "logit_scales": (lambda s, p: saved(s | {"logit_scale": torch.ones(3)}, p), "another shape (logit_scale: [3]"),
    "odd_grid": (lambda s, p: saved(s | {"visual.positional_embedding": torch.ones(12, 32)}, p), "another shape"),
    "integers": (lambda s, p: saved(s | {"ln_final.weight": torch.ones(32, dtype=torch.int8)}, p), "stored as int8"),
    "sparse": (lambda s, p: saved(s | {"visual.proj": torch.eye(32, 16).to_sparse()}, p), "sparse"),
    "npz": (lambda s, p: (np.savez(p.open("wb"), a=np.ones(2)), p)[1], "NumPy archive"),
    "bomb": (lambda s, p: bomb(p), "would unpack to 50,000,000 bytes"),
    "meta": (lambda s, p: saved({k: v.to("meta") for k, v in s.items()}, p), "tensors are without values"),
    "flipped_bit": (lambda s, p: flipped(saved(s, p)), "does not match its checksum"),
    "zip": (lambda s, p: (zipfile.ZipFile(p, "w").writestr("a.txt", "b"), p)[1], "zip archive of other files"),
}


@pytest.mark.parametrize("kind", list(REFUSED))
def test_a_file_that_is_not_these_weights_is_refused_in_one_short_line(kind: str, state: State, tmp_path: Path) -> None:
    write, phrase = REFUSED[kind]
    with pytest.raises(DataError) as error:
        describe(card_of(write(state, tmp_path / "w.pt")))
    assert phrase in str(error.value)
    assert str(error.value).startswith("model 'own': cannot load '")
    assert "\n" not in str(error.value) and len(f"farebox: {error.value}") <= 300


def test_the_command_refuses_it_before_anything_is_made(
    state: State, tmp_path: Path, lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = saved({f"text_model.{'x' * 200}.{n}": torch.zeros(1) for n in range(300)}, tmp_path / f"{'long' * 40}.pt")
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"kind: open_clip\narch: small\nweights: {weights}\n")
    words = [f"model={mine}", f"datasets=[{lab.card}]", f"storage={tmp_path / 's'}", "eval_shift=false"]
    assert main(["plan", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and len(error) <= 301 and error.endswith("name a file in open_clip's layout\n")
    assert not (tmp_path / "s").exists()


# --- what open_clip's own loader changes ---------------------------------------------------------------------------


def resized(state: State, key: str, length: int) -> State:
    return state | {key: torch.randn(length, state[key].shape[1])}


BRIDGED: dict[str, tuple[str, Callable[[State], State], str]] = {
    "grid": (
        "small",
        lambda s: resized(s, "visual.positional_embedding", 10),
        "positional_embedding resized from 10 to 17",
    ),
    "context": (
        "small",
        lambda s: resized(s, "positional_embedding", 20),
        "positional_embedding resized from 20 to 12",
    ),
    "custom_text": ("small-custom", lambda s: s, "keys of the text tower moved under 'text.'"),
    "scalar": ("small", lambda s: s | {"logit_scale": s["logit_scale"][None]}, "logit_scale reshaped from [1] to []"),
    "bias": ("small-siglip-loss", lambda s: s, "logit_bias, which the file lacks, set to 0"),
    "half": ("small", lambda s: {k: v.half() for k, v in s.items()}, "tensors converted from float16 to float32"),
}


@pytest.mark.parametrize("kind", list(BRIDGED))
def test_what_open_clips_loader_changes_is_the_same_here_and_noted(
    kind: str, state: State, tmp_path: Path, lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    arch, change, phrase = BRIDGED[kind]
    path = saved(change(state), tmp_path / "w.pt")
    known = describe(card_of(path, arch))
    assert any(phrase in note for note in known.notes), known.notes
    assert phrase in known.identity
    reference = open_clip.create_model(arch, pretrained=str(path)).state_dict()
    found = loaded(known.card)
    assert found.keys() == reference.keys()
    assert all(torch.equal(found[key], reference[key]) for key in found)
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"kind: open_clip\narch: {arch}\nweights: {path}\n")
    words = [
        f"model={mine}",
        f"datasets=[{lab.card}]",
        "sweep=smoke",
        f"storage={tmp_path / 's'}",
        "methods=[zero_shot]",
    ]
    assert main(["plan", *words]) == 0
    assert phrase in capsys.readouterr().out
    assert any(phrase in line for line in announcements(lab.plan(f"model={mine}", "methods=[zero_shot]")))


def test_a_bias_of_all_scores_is_skipped_and_said(state: State, tmp_path: Path) -> None:
    known = describe(card_of(saved(state | {"logit_bias": torch.tensor(-3.0)}, tmp_path / "w.pt")))
    assert any("skipped logit_bias" in note for note in known.notes)


def test_batch_norm_counters_may_be_absent(tmp_path: Path) -> None:
    state = random_state("small-rn")
    fewer = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    assert len(fewer) < len(state)
    found = loaded(card_of(saved(fewer, tmp_path / "w.pt"), "small-rn"))
    assert all(torch.equal(found[key], fewer[key]) for key in fewer)


def test_a_file_that_changes_after_the_plan_is_refused_by_the_replica(state: State, tmp_path: Path, lab: Lab) -> None:
    path, mine = saved(state, tmp_path / "w.pt"), tmp_path / "mine.yaml"
    mine.write_text(f"kind: open_clip\narch: small\nweights: {path}\n")
    (spec,) = lab.plan(f"model={mine}", "methods=[zero_shot]").trials
    assert models.load(spec.model).identity == spec.model_identity
    saved(random_state("small-quickgelu") | {"logit_scale": torch.tensor(1.0)}, path)
    with pytest.raises(DataError, match="does not have the digest that its card states"):
        models.load(spec.model)


def test_a_stated_digest_is_compared_without_regard_to_case_and_for_tags_too(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(state, tmp_path / "w.pt")
    digest = describe(card_of(path)).card.weights_sha256
    assert describe(card_of(path, weights_sha256=digest.upper())).identity == describe(card_of(path)).identity
    monkeypatch.setattr(architecture, "cached_file", lambda settings: path)
    tag = card_of(Path("openai"), "ViT-B-32-quickgelu", weights_sha256="0" * 64)
    with pytest.raises(DataError, match="does not have the digest that its card states"):
        describe(tag)


@pytest.mark.parametrize(
    ("arch", "phrase"),
    [
        ("hf-hub:org/model", "is a place: write open_clip's name and set weights"),
        ("local-dir:/a/folder", "is a place"),
        ("ViT-B/32", "no architecture 'ViT-B/32' (near: ViT-B-32"),
        ("", "no architecture '' (near: none)"),
    ],
)
def test_an_architecture_is_open_clips_own_name(arch: str, phrase: str) -> None:
    with pytest.raises(ConfigError) as error:
        describe(card_of(Path("/a/file.pt"), arch))
    assert phrase in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("weights", ["openai", "laion2b-s34b-b79k", "laion2b_s34b_b79k"])
def test_a_file_is_never_taken_for_a_tag(weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip also reads 'laion2b-s34b-b79k' as a tag, whatever file has that name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(architecture, "cached_file", lambda settings: None)
    Path(weights).write_bytes(b"not weights at all")
    card = ModelCard(name="own", kind="open_clip", arch="ViT-B-32", weights=weights, quick_gelu=weights == "openai")
    if architecture.has_tag(card):
        assert describe(card).identity.startswith(f"ViT-B-32/{weights}")
    else:
        with pytest.raises(DataError, match="cannot load"):
            describe(card)


def test_a_run_on_this_machine_fetches_a_tags_weights_before_ray_starts(
    tmp_path: Path, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(card: ModelCard) -> Path:
        raise OSError("no network")

    monkeypatch.setattr(architecture, "cached_file", lambda settings: None)
    monkeypatch.setattr(architecture, "fetched_file", offline)
    plan = lab.plan("model=vit_b32", "methods=[zero_shot]")
    with pytest.raises(DataError, match="open_clip cannot fetch 'openai': no network"):
        make_plan(plan.config, fetch=True)
    assert make_plan(replace(plan.config, address="10.0.0.1:6379"), fetch=True).trials, "replicas fetch them"


# --- the input rule ------------------------------------------------------------------------------------------------

OTHER_RULE = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "interpolation": "bilinear", "resize_mode": "squash"}


def test_a_local_file_has_the_rule_that_its_architectures_tags_share() -> None:
    refused = set()
    for arch in dict.fromkeys(arch for arch, _ in open_clip.list_pretrained()):
        tags = open_clip.list_pretrained_tags_by_model(arch)
        by_tag = {architecture.input_rule(card_of(Path(tag), arch), 224)[0] for tag in tags}
        try:
            by_file = architecture.input_rule(card_of(Path("/a/file.pt"), arch), 224)[0]
        except ConfigError as error:
            assert len(by_tag) > 1, arch
            assert "differ in" in str(error) and len(str(error)) < 300
            refused.add(arch)
        else:
            assert by_tag == {by_file}, arch
    assert refused == {"ViT-L-14", "ViT-H-14", "ViT-H-14-quickgelu"}
    assert architecture.input_rule(card_of(Path("/a"), "PE-Core-T-16-384"), 384)[0].mode == "squash"


def test_where_tags_differ_the_card_states_what_differs() -> None:
    with pytest.raises(ConfigError, match=r"ViT-L-14 differ in mean, std .*: state mean and std in the card"):
        architecture.input_rule(card_of(Path("/a"), "ViT-L-14"), 224)
    half = (0.5, 0.5, 0.5)
    with pytest.raises(ConfigError, match="differ in std"):
        architecture.input_rule(card_of(Path("/a"), "ViT-L-14", mean=half), 224)
    rule, whose = architecture.input_rule(card_of(Path("/a"), "ViT-L-14", mean=half, std=half), 224)
    assert (rule.mean, rule.std, rule.mode, rule.filter) == (half, half, "shortest", "bicubic")
    assert whose.startswith("mean, std from the card, else the rule of")


def test_the_stated_rule_is_used_recorded_printed_and_part_of_the_trial_id(
    state: State, tmp_path: Path, lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    path, mine = saved(state, tmp_path / "w.pt"), tmp_path / "mine.yaml"
    ids = {}
    for key in (None, *OTHER_RULE):
        value = OTHER_RULE[key] if key else None
        line = f"{key}: {list(value) if isinstance(value, tuple) else value}\n" if key else ""
        mine.write_text(f"kind: open_clip\narch: small\nweights: {path}\n{line}")
        (spec,) = lab.plan(f"model={mine}", "methods=[zero_shot]").trials
        assert models.load(spec.model).transform == spec.transform
        ids[spec.trial_id] = spec.transform
    assert len(ids) == len(set(ids.values())) == 5
    assert main(["plan", f"model={mine}", f"datasets=[{lab.card}]", "methods=[zero_shot]", "sweep=smoke"]) == 0
    printed = capsys.readouterr().out
    assert "model mine: small, GELU; images squashed to 32x32 (bicubic), mean 0.4815" in printed
    assert "resize_mode from the card, else open_clip's default, as no tag has a rule" in printed


def test_the_row_of_a_trial_that_failed_states_the_rule_too(lab: Lab) -> None:
    assert spec_columns(lab.spec("zero_shot"))["transform"] == "grey8"


@pytest.mark.parametrize(
    ("line", "phrase"),
    [
        ("mean: [0.5, 0.5]", "mean: (0.5, 0.5): expected three numbers from 0 to 1"),
        ("mean: 0.5", "expected three numbers"),
        ("mean: [123.7, 116.3, 103.5]", "pixels are divided by 255"),
        ("mean: [.nan, 0.5, 0.5]", "expected a finite number"),
        ("mean: [true, 0.5, 0.5]", "expected a finite number"),
        ("std: [0, 0.5, 0.5]", "std: (0.0, 0.5, 0.5): expected three numbers above 0"),
        ("std: [.inf, 0.5, 0.5]", "expected a finite number"),
        ("std: [-0.5, 0.5, 0.5]", "expected three numbers"),
        ("std: '0.5'", "expected three numbers"),
        ("interpolation: bicubik", "did you mean 'bicubic'"),
        ("resize_mode: longest", "no choice named 'longest'"),
        ("quick_gelu: 'yes'", "expected true or false"),
        ("arch: [32]", "arch=[32]: expected"),
        ("means: [0.5, 0.5, 0.5]", "did you mean 'mean'"),
    ],
)
def test_a_card_key_that_cannot_be_meant_is_refused(tmp_path: Path, line: str, phrase: str) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"kind: open_clip\nweights: openai\n{line}\n")
    with pytest.raises(ConfigError) as error:
        model_card(str(mine))
    assert phrase in str(error.value)


def test_the_toy_has_no_input_rule_to_state(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("kind: fake\nmean: [0.5, 0.5, 0.5]\n")
    with pytest.raises(ConfigError, match="a fake model has no such setting"):
        model_card(str(tmp_path / "mine.yaml"))


# --- the activation ------------------------------------------------------------------------------------------------


def test_a_tag_under_an_architecture_of_the_other_activation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architecture.importlib.util, "find_spec", lambda name: True)  # as if all was installed
    refused = 0
    for arch, tag in open_clip.list_pretrained():
        card = card_of(Path(tag), arch)
        trained = open_clip.get_pretrained_cfg(arch, tag).get("quick_gelu", False)
        try:
            computed = architecture.quick_gelu(card)
        except ConfigError as error:
            refused += 1
            assert "were trained with" in str(error) and len(str(error)) < 300
            assert architecture.quick_gelu(replace(card, quick_gelu=trained)) == trained
        else:
            assert computed == trained, (arch, tag)
    assert refused > 20
    with pytest.raises(ConfigError, match="write arch: ViT-B-32-quickgelu in the card"):
        architecture.quick_gelu(card_of(Path("openai"), "ViT-B-32"))


def test_openais_weights_by_path_are_known_by_their_digest_or_their_place() -> None:
    digest = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
    known = architecture.known_file(Path("/a/b.pt"), digest)
    assert known and known.tag == "openai" and known.arch == "ViT-B-32"
    in_hub = Path("/h/hub/models--timm--vit_base_patch32_clip_224.openai/snapshots/0/open_clip_model.safetensors")
    assert architecture.known_file(in_hub, "0" * 64) == known
    assert architecture.known_file(Path("/a/b.pt"), "0" * 64) is None
    card = card_of(in_hub, "ViT-B-32")
    with pytest.raises(ConfigError, match="'openai' were trained with QuickGELU"):
        architecture.quick_gelu(card, known)
    assert architecture.quick_gelu(replace(card, arch="ViT-B-32-quickgelu"), known)
    assert architecture.quick_gelu(replace(card, quick_gelu=True), known)
    assert architecture.input_rule(replace(card, arch="ViT-L-14"), 224, known)[1] == "the rule of 'openai'"


@pytest.mark.parametrize("layout", ["torchscript", "mixed"])
def test_weights_in_openais_layout_under_a_plain_architecture_are_refused_until_the_card_says(
    layout: str, state: State, tmp_path: Path
) -> None:
    path = tmp_path / "w.pt"
    if layout == "torchscript":
        traced(state, path)
    else:
        saved(state | {"visual.conv1.weight": state["visual.conv1.weight"].half()}, path)
    with pytest.raises(
        ConfigError, match="OpenAI's code were trained with QuickGELU, and small computes GELU: write arch"
    ):
        describe(card_of(path))
    quick, stated, plain = (
        describe(card_of(path, arch, quick_gelu=said))
        for arch, said in (("small-quickgelu", None), ("small", True), ("small", False))
    )
    assert "QuickGELU; images" in quick.rule and "QuickGELU; images" in stated.rule and "small, GELU" in plain.rule
    assert "quick_gelu=true" in stated.identity and "quick_gelu=false" in plain.identity


@torch.inference_mode()
def test_the_stated_activation_is_computed(state: State, tmp_path: Path) -> None:
    path = saved(state, tmp_path / "w.pt")
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    cards = (card_of(path), card_of(path, quick_gelu=True), card_of(path, "small-quickgelu", quick_gelu=False))
    gelu, quick, back = (load_network(card, torch.device("cpu"))[0].eval().encode_image(image) for card in cards)
    assert torch.equal(gelu, back) and not torch.equal(gelu, quick)
    assert len({describe(card).identity for card in cards}) == 3


def test_a_file_of_unknown_activation_is_announced(state: State, tmp_path: Path) -> None:
    note = "weights trained with QuickGELU (OpenAI's, MetaCLIP's, DFN's) need arch: small-q"
    path = saved(state, tmp_path / "w.pt")
    assert any(note in line for line in describe(card_of(path)).notes)
    assert not describe(card_of(path, quick_gelu=False)).notes


# --- text towers and tokenizers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "tag"), [("coca_ViT-B-32", "laion2b_s13b_b90k"), ("MobileCLIP-B", "datacompdr")])
def test_a_plan_grants_no_soft_prompts_where_the_text_tower_takes_strings_only(
    arch: str, tag: str, tmp_path: Path, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(architecture, "cached_file", lambda settings: None)
    (tmp_path / "mine.yaml").write_text(f"kind: open_clip\narch: {arch}\nweights: {tag}\n")
    plan = lab.plan(f"model={tmp_path / 'mine.yaml'}", "methods=[craft,zero_shot]")
    assert [name for name, _ in plan.unable] == ["craft"]
    assert "model mine: SOFT is not granted: its text tower takes prompts as strings only" in announcements(plan)
    assert Access.SOFT not in plan.config.model.access and plan.trials[0].model.access.covers(Access.FEATURES)


@pytest.mark.parametrize("arch", ["small", "small-custom"])
def test_the_plan_grants_what_the_loaded_model_grants(arch: str, state: State, tmp_path: Path) -> None:
    known = describe(card_of(saved(state, tmp_path / "w.pt"), arch))
    assert known.card.access.closure() == models.load(known.card).grant.closure()
    assert known.card.access.covers(Access.SOFT) == (arch == "small")


@pytest.mark.parametrize("arch", ["ViT-B-16-SigLIP", "roberta-ViT-B-32", "ViT-L-14-CLIPA"])
def test_a_dependency_that_is_not_installed_is_named_with_what_to_type(
    arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(architecture.importlib.util, "find_spec", lambda name: None)
    tag = open_clip.list_pretrained_tags_by_model(arch)[0]
    with pytest.raises(ConfigError, match="needs transformers, which is not installed: type pip install transformers"):
        describe(card_of(Path(tag), arch))


class OtherTokenizer:
    """As open_clip's wrapper of a tokenizer of transformers."""

    tokenizer_mode = ""

    def clean_fn(self, text: str) -> str:
        return text.strip()

    def tokenizer(self, texts: list[str], add_special_tokens: bool = True) -> dict[str, list[list[int]]]:
        return {"input_ids": [[1] * (len(text.split()) + 2 * add_special_tokens) for text in texts]}


def test_lengths_are_counted_before_a_tokenizer_cuts() -> None:
    tokenizer, other = open_clip.get_tokenizer("small"), OtherTokenizer()
    texts = ["a cat", "a " * 40]
    assert architecture.prompt_lengths(tokenizer, texts) == [4, 42]
    assert (tokenizer(texts) != 0).sum(1).tolist() == [4, 12], "open_clip's tokenizer cuts"
    assert architecture.prompt_lengths(other, texts) == [4, 42]
    other.tokenizer_mode = "clips"
    assert architecture.prompt_lengths(other, texts) == [5, 43]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=st.text(st.characters(max_codepoint=127, exclude_characters="&"), max_size=60))
def test_a_text_has_no_more_tokens_than_ascii_letters(text: str) -> None:
    assert architecture.prompt_lengths(BYTE_PAIRS, [text])[0] <= len(text) + 2


BYTE_PAIRS = open_clip.SimpleTokenizer()
LONG = "a very long description of how this thing looks from far away and near by"


def test_a_prompt_that_does_not_fit_a_whole_string_tower_is_refused_and_never_cut(state: State, tmp_path: Path) -> None:
    model = models.load(card_of(saved(state, tmp_path / "w.pt"), "small-custom"))
    assert model.encode_prompts(TextPrompts((("a a a a a a a a a a",),))).shape == (1, 1, 16)
    with pytest.raises(EndpointRefused, match=r"a prompt of 13 tokens \(the model takes 12\)"):
        model.encode_prompts(TextPrompts((("a a a a a a a a a a a", "short"),)))


@pytest.mark.parametrize("arch", ["small", "small-custom"])
def test_a_plan_refuses_class_names_that_do_not_fit(arch: str, state: State, tmp_path: Path, lab: Lab) -> None:
    mine, data = tmp_path / "mine.yaml", tmp_path / "small.yaml"
    mine.write_text(f"kind: open_clip\narch: {arch}\nweights: {saved(state, tmp_path / 'w.pt')}\n")
    words = (f"model={mine}", f"datasets=[{data}]", "methods=[zero_shot]")
    text = lab.card.read_text()
    data.write_text(text)
    assert lab.plan(*words).trials
    for old, new, phrase in (
        ("an icon of a {}.", f"{LONG} {{}}", "5 of 5 class names are too long for model 'mine'"),
        ("a picture of a {}", f"{LONG} {{}}", "with template 'a very long description of how this t...'"),
    ):
        data.write_text(text.replace(old, new))
        with pytest.raises(DataError) as error:
            lab.plan(*words)
        assert phrase in str(error.value) and "the model takes 12: shorten" in str(error.value)
        assert len(str(error.value)) < 300


def test_class_names_of_other_test_sets_and_soft_contexts_are_checked_too(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="after 40 context tokens of coop is"):
        lab.plan("model=tiny", "methods=[coop]", "method.coop.n_ctx=40")
    assert lab.plan("model=tiny", "methods=[coop]").trials
    other = tmp_path / "other.yaml"
    other.write_text(lab.card.read_text().replace("an icon of a {}.", f"{LONG} {LONG} {{}}"))
    with pytest.raises(DataError, match="data set 'other': 5 of 5 class names are too long for model 'tiny'"):
        lab.plan("model=tiny", "methods=[zero_shot]", f"transfer=[{other}]")


def test_a_tokenizer_that_is_not_here_is_fetched_by_a_run_alone(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tokenizer(card: ModelCard, fetch: bool = True) -> Any:
        raise OSError("no tokenizer.json in the cache")

    monkeypatch.setattr(architecture, "tokenizer", tokenizer)
    monkeypatch.setenv("FAREBOX_CACHE", str(tmp_path))  # another test's plan may have stored the lengths
    plan = lab.plan("model=tiny", "methods=[zero_shot]")
    assert (
        "model tiny: lengths of prompts are not checked: its tokenizer is not on this machine" in announcements(plan)[0]
    )
    with pytest.raises(ConfigError, match="its tokenizer cannot be loaded: no tokenizer"):
        make_plan(plan.config, fetch=True)


# --- what did not change -------------------------------------------------------------------------------------------


def test_the_embedded_model_has_its_old_input_rule_and_no_notes(tiny: Endpoint) -> None:
    known = facts.describe(model_card("tiny"))
    assert known.notes == () and known.identity == f"tiny/{known.card.weights_sha256}" == tiny.info.identity
    assert (
        known.transform
        == tiny.info.transform
        == ("resize64-bicubic-shortest-(0.48145466, 0.4578275, 0.40821073)-(0.26862954, 0.26130258, 0.27577711)")
    )


@pytest.mark.parametrize("n", [10, 299, 300, 301, 5000])
def test_a_shortened_line_keeps_its_ends(n: int) -> None:
    line = shortened("found: " + "x y\n" * (n // 4) + " wanted: type this")
    assert len(line) <= 300 and "\n" not in line
    assert line.startswith("found:") and line.endswith("wanted: type this")
    assert (" ... " in line) == (n > 275)
