"""Recording parity cases: the inputs in numpy, and the whole command against a small PyTorch model where torch is installed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.parity import record

IDS = record.ImageIds(start=91, context=90, end=92)
ROWS = ["5 <image> 6 7 8 9", "3 4 <image> 11"]


# --- inputs ---------------------------------------------------------------------------------------------------------------------------


def test_expand_writes_image_blocks() -> None:
    assert record.expand([5, None, 6], [3], IDS, 2) == [5, 91, *[90] * 6, 92, 6]
    assert record.expand([None, None], [1, 2], IDS, 1) == [91, 90, 92, 91, 90, 90, 92]
    assert record.expand([1, 2], [], IDS, 4) == [1, 2]


def test_right_padding_labels_and_flags() -> None:
    inputs = record.build_inputs([[1, 2, 3, 4, 5], [6, 7]], np.zeros((2, 3, 4, 4), np.float32), 1, 0, "right", 2, False)
    assert inputs["input_ids"].tolist() == [[1, 2, 3, 4, 5], [6, 7, 0, 0, 0]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert inputs["labels"].tolist() == [[-100, -100, -100, 4, 5], [-100, 7, -100, -100, -100]]  # at most half of a row
    assert inputs["image_flags"].tolist() == [1, 0]
    assert "position_ids" not in inputs


def test_left_padding_and_positions_that_skip_it() -> None:
    inputs = record.build_inputs([[1, 2, 3], [6]], np.zeros((1, 3, 4, 4), np.float32), 0, 9, "left", 0, True)
    assert inputs["input_ids"].tolist() == [[1, 2, 3], [9, 9, 6]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2], [1, 1, 0]]
    assert "labels" not in inputs


def test_tiles_are_cut_row_by_row_with_a_thumbnail_last(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="cutting pictures needs pillow")
    colours = np.uint8([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]]).repeat(8, 0).repeat(8, 1)
    image.fromarray(colours).save(tmp_path / "four.png")
    tiles = record.picture_tiles(str(tmp_path / "four.png"), 8, (2, 2), np.random.default_rng(0))
    assert tiles.shape == (5, 8, 8, 3)
    assert [tile[3, 3].tolist() for tile in tiles[:4]] == [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]
    assert record.picture_tiles("noise", 8, (1, 1), np.random.default_rng(0)).shape == (1, 8, 8, 3)
    with pytest.raises(record.CannotRecord, match=r"none\.png"):
        record.picture_tiles(str(tmp_path / "none.png"), 8, (1, 1), np.random.default_rng(0))


def test_normalise_is_imagenet_in_channel_order() -> None:
    pixels = record.normalise(np.full((1, 2, 2, 3), 255, np.uint8))
    assert pixels.shape == (1, 3, 2, 2) and pixels.dtype == np.float32
    np.testing.assert_allclose(pixels[0, :, 0, 0], [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225], rtol=1e-6)


def test_tolerances_grow_with_the_values() -> None:
    small, large = np.float32([-1, 1]), np.float32([-10, 10])
    assert record.tolerance("logits", small) == {"atol": 2e-5, "rtol": 1e-5}
    assert record.tolerance("logits", large) == {"atol": pytest.approx(2e-4), "rtol": 1e-5}
    assert record.tolerance("logits", small, measured=1e-4) == {"atol": pytest.approx(1e-3), "rtol": 1e-5}
    assert record.tolerance("loss", np.float32(3)) == {"atol": 5e-6, "rtol": 0.0}
    assert record.tolerance("grad:mlp1.1.weight", small) == {"atol": 2e-5, "rtol": 1e-4}
    assert record.tolerance("generated_ids", np.int64([[1]])) == {"exact": True}


def test_group_comes_from_the_config() -> None:
    mono: dict[str, Any] = {
        "vision_config": {"model_type": "intern_vit_patch"},
        "llm_config": {"architectures": ["InternLM2VEForCausalLM"]},
    }
    assert record.group_of(mono) == "mono_internvl"
    mono["llm_config"]["use_attention_ve"] = True
    assert record.group_of(mono) == "mono_internvl_1_5"
    with pytest.raises(record.CannotRecord, match="--group"):
        record.group_of({"model_type": "llama"})


def test_a_bad_request_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert record.main(["--model", str(tmp_path), "--out", str(tmp_path / "case"), "--prompt", "hello"]) == 2
    assert "there is no config.json in it" in capsys.readouterr().err


# --- the whole command ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of random weights in the released layout."""
    pytest.importorskip("torch", reason="recording needs torch (extra `torch`)")
    pytest.importorskip("transformers", reason="recording needs transformers (extra `hf`)")
    from tests.experiments.tiny_torch_model import TinyMono, tiny_config

    folder = tmp_path_factory.mktemp("upstream") / "tiny"
    TinyMono.write(folder, tiny_config())
    return folder


def run(weights: Path, out: Path, *more: str) -> int:
    model = ["--model", str(weights), "--model-class", "tests.experiments.tiny_torch_model:TinyMono"]
    return record.main([*model, "--out", str(out), "--img-ids", "91", "90", "92", *more])


def test_a_recorded_case_has_the_format(weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "left_padded"
    grads = ["mlp1.1.weight", "language_model.model.layers.0.feed_forward_ve.w1.weight"]
    more = ["--padding", "left", "--grid", "2x1", "--images", "noise", "noise", "--generate", "5", "--hidden-states", "--float64"]
    assert run(weights, out, "--token-ids", *ROWS, *more, "--grad", *grads) == 0

    case = json.loads((out / "case.json").read_text("utf-8"))
    inputs, outputs = dict(np.load(out / "inputs.npz")), dict(np.load(out / "outputs.npz"))
    assert {path.name for path in out.iterdir()} >= {"config.json", "model.safetensors", "README.txt"}
    assert (case["group"], case["case"], case["num_image_token"], case["generate"]) == ("mono_internvl", "left_padded", 4, {})
    assert int(inputs["img_context_token_id"]) == case["img_context_token_id"] == 90
    assert set(outputs) == set(case["compare"]) | set(case["debug_only"]) and not set(case["compare"]) & set(case["debug_only"])
    assert {name: list(value.shape) for name, value in outputs.items()} == case["outputs"]

    batch, length = inputs["input_ids"].shape
    assert (batch, length) == (2, 5 + 2 + 12) and inputs["attention_mask"][1].tolist() == [0, 0, *[1] * 17]
    assert inputs["pixel_values"].shape == (6, 3, 56, 56) and inputs["pixel_values"].dtype == np.float32
    assert (inputs["input_ids"] == 90).sum() == 6 * 4
    assert outputs["logits"].shape == (2, length, 96) and outputs["loss"].shape == ()
    assert outputs["vit_embeds"].shape == (6, 4, 32)
    assert outputs["generated_ids"].shape == (2, 5) and outputs["gen_scores"].shape == (5, 2, 96)
    np.testing.assert_array_equal(outputs["gen_scores"].argmax(-1).T, outputs["generated_ids"])
    ordered = np.sort(outputs["gen_scores"], -1)
    np.testing.assert_array_equal(outputs["gen_top2_margin"], ordered[..., -1] - ordered[..., -2])
    assert case["compare"]["generated_ids"] == {"exact": True}
    assert all(value.dtype == np.float32 for name, value in outputs.items() if name != "generated_ids")
    assert all(np.abs(outputs[f"grad:{name}"]).max() > 0 for name in grads)
    assert 0 < case["fp32_vs_fp64_max_abs_diff"]["logits"] < 1e-4


def test_the_recorded_loss_is_the_recorded_logits_loss(weights: Path, tmp_path: Path) -> None:
    assert run(weights, tmp_path / "case", "--token-ids", ROWS[0], "--images", "noise") == 0
    inputs, outputs = np.load(tmp_path / "case" / "inputs.npz"), np.load(tmp_path / "case" / "outputs.npz")
    logits, targets = outputs["logits"][0, :-1].astype(np.float64), inputs["labels"][0, 1:]
    nll = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(targets)), np.maximum(targets, 0)]
    np.testing.assert_allclose(outputs["loss"], nll[targets >= 0].mean(), atol=1e-5)


def test_a_text_row_gets_one_unused_tile_and_eos_stops(weights: Path, tmp_path: Path) -> None:
    assert run(weights, tmp_path / "text", "--token-ids", "5 6 7 8", "--supervise", "2") == 0
    inputs = np.load(tmp_path / "text" / "inputs.npz")
    assert inputs["image_flags"].tolist() == [0] and inputs["pixel_values"].shape == (1, 3, 56, 56)

    assert run(weights, tmp_path / "free", "--token-ids", ROWS[0], "--images", "noise", "--generate", "6") == 0
    third = int(np.load(tmp_path / "free" / "outputs.npz")["generated_ids"][0, 2])
    assert run(weights, tmp_path / "eos", "--token-ids", ROWS[0], "--images", "noise", "--generate", "6", "--eos", str(third)) == 0
    stopped = np.load(tmp_path / "eos" / "outputs.npz")["generated_ids"][0]
    assert stopped[-1] == third and len(stopped) <= 3
    assert json.loads((tmp_path / "eos" / "case.json").read_text("utf-8"))["generate"] == {"eos": third}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--token-ids", ROWS[0]], "1 <image> marks but --images names 0"),
        (["--token-ids", ROWS[0], "--images", "noise", "--grad", "mlp1.1.wieght"], "the nearest are mlp1.1.weight"),
        (["--token-ids", ROWS[0], "--images", "noise", "--grad", "mlp1.1.weight", "--supervise", "0"], "--grad needs a loss"),
        (
            ["--token-ids", ROWS[0], "--images", "noise", "--grad", "vision_model.embeddings.class_embedding"],
            "the loss does not depend on this parameter",
        ),
        (["--token-ids", *ROWS, "--images", "noise", "noise", "--generate", "2"], "--padding left"),
        (["--token-ids", ROWS[0], "--images", "noise", "--grid", "2"], "COLUMNSxROWS"),
    ],
)
def test_what_makes_no_case(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str) -> None:
    assert run(weights, tmp_path / "case", *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "case").exists()


def test_code_of_the_folder_runs_only_when_trusted(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "foreign"
    folder.mkdir()
    config = json.loads((weights / "config.json").read_text("utf-8")) | {"auto_map": {"AutoModel": "modeling.Model"}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "modeling.py").write_text("raise SystemExit('this code must not run')", encoding="utf-8")
    assert record.main(["--model", str(folder), "--out", str(tmp_path / "case"), "--token-ids", "1 2", "--img-ids", "91", "90", "92"]) == 2
    assert "--trust-remote-code" in capsys.readouterr().err


def test_a_case_is_never_overwritten(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "case").mkdir()
    (tmp_path / "case" / "mine.txt").write_text("mine", encoding="utf-8")
    assert run(weights, tmp_path / "case", "--token-ids", "1 2") == 2
    assert "not empty" in capsys.readouterr().err
