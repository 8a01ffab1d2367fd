import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from monovl_jax.data.chat import TEMPLATES, Turn, build_prompt, control_tokens, encode_conversation, encode_prompt, parse_turns
from monovl_jax.data.errors import SampleError
from monovl_jax.data.tokenizer import AddedToken, Tokenizer, _SentencePieceBackend
from tests.data.helpers import tiny_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "preprocess"
INTERNLM, QWEN = GOLDEN / "labels_internlm2" / "tokenizer", GOLDEN / "labels_internvl2_5_qwentok" / "tokenizer"
DIALOG = [Turn("user", "Hello"), Turn("assistant", "Hi"), Turn("user", "And?"), Turn("assistant", "Ok")]


def test_compact_marks_answers_and_their_end() -> None:
    tokenizer = tiny_tokenizer()
    encoded = encode_conversation(DIALOG, TEMPLATES["compact"], tokenizer)
    assert tokenizer.decode(encoded.ids, skip_special=False) == "<|user|>Hello<|assistant|>Hi<|end|><|user|>And?<|assistant|>Ok<|end|>"
    assert tokenizer.decode(encoded.ids[encoded.supervised], skip_special=False) == "Hi<|end|>Ok<|end|>"
    assert (encoded.labels == np.where(encoded.supervised, encoded.ids, -100)).all()


@pytest.mark.parametrize("folder", [INTERNLM, QWEN], ids=["internlm2", "qwen"])
@pytest.mark.parametrize("name", ["internlm2-chat", "Hermes-2", "internvl2_5"])
def test_training_ids_continue_the_prompt_and_equal_the_whole_string(folder: Path, name: str) -> None:
    tokenizer, template = Tokenizer.from_folder(folder), TEMPLATES[name]
    whole = encode_conversation(DIALOG, template, tokenizer)
    assert whole.ids.tolist() == tokenizer.encode(build_prompt(template, DIALOG), prefix=True)
    prompt = encode_prompt(DIALOG[:3], template, tokenizer)
    assert whole.ids[: len(prompt)].tolist() == prompt.tolist()
    assert whole.supervised[len(prompt)] and not whole.supervised[len(prompt) - 1]


@pytest.mark.parametrize("folder", [INTERNLM, QWEN], ids=["internlm2", "qwen"])
def test_images_expand_like_the_expanded_string(folder: Path) -> None:
    tokenizer, template = Tokenizer.from_folder(folder), TEMPLATES["internvl2_5"]
    turns = [Turn("user", "a <image>\n<image> b"), Turn("assistant", "c")]
    encoded = encode_conversation(turns, template, tokenizer, [1, 3], 2)
    text = build_prompt(template, turns).replace("<image>", "<img>" + "<IMG_CONTEXT>" * 2 + "</img>", 1)
    text = text.replace("<image>", "<img>" + "<IMG_CONTEXT>" * 6 + "</img>", 1)
    assert encoded.ids.tolist() == tokenizer.encode(text, prefix=True) and encoded.image_slots == 8


def test_a_single_picture_goes_first_if_nobody_mentions_it() -> None:
    tokenizer, template = tiny_tokenizer(), TEMPLATES["compact"]
    encoded = encode_conversation(DIALOG, template, tokenizer, [1], 2)
    text = tokenizer.decode(encoded.ids, skip_special=False)
    assert text.startswith("<|user|><img><IMG_CONTEXT><IMG_CONTEXT></img>\nHello")
    later = [DIALOG[0], DIALOG[1], Turn("user", "<image>And?"), DIALOG[3]]
    assert tokenizer.decode(encode_conversation(later, template, tokenizer, [1], 2).ids, skip_special=False).count("<img>") == 1


@pytest.mark.parametrize(
    ("turns", "tiles", "message"),
    [
        ([], [], "conversation is empty"),
        ([Turn("assistant", "x")], [], "conversation is empty"),
        ([Turn("user", "a"), Turn("user", "b")], [], "do not alternate"),
        ([Turn("system", "a"), Turn("user", "b")], [], "unknown role 'system'"),
        ([Turn("user", "<image>"), Turn("assistant", "b")], [], "1 <image> for 0 picture"),
        ([Turn("user", "<image>"), Turn("assistant", "b")], [1, 1], "1 <image> for 2 picture"),
        ([Turn("user", "<image><image>"), Turn("assistant", "b")], [1], "2 <image> for 1 picture"),
    ],
)
def test_bad_conversations(turns: list[Turn], tiles: list[int], message: str) -> None:
    with pytest.raises(SampleError, match=message):
        encode_conversation(turns, TEMPLATES["compact"], tiny_tokenizer(), tiles, 2)


def test_a_trusted_image_token_in_a_text_is_refused() -> None:
    turns = [Turn("user", "<image><IMG_CONTEXT>"), Turn("assistant", "b")]
    with pytest.raises(SampleError, match="contains the token"):
        encode_conversation(turns, replace(TEMPLATES["compact"], trust_control_tokens=True), tiny_tokenizer(), [1], 2)


FOLDERS = {"internlm2": INTERNLM, "qwen": QWEN, "tiny": None}


def tokenizer_named(name: str) -> Tokenizer:
    folder = FOLDERS[name]
    return tiny_tokenizer() if folder is None else Tokenizer.from_folder(folder)


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("name", ["internlm2-chat", "Hermes-2", "internvl2_5", "compact"])
def test_no_text_makes_a_control_token(kind: str, name: str) -> None:
    """Whoever writes, and however the tokens are put together: the control tokens of a conversation are those of its template."""
    tokenizer, template = tokenizer_named(kind), TEMPLATES[name]
    controls = control_tokens(template, tokenizer)
    rng, names = np.random.default_rng(0), [*control_tokens(template, tokenizer), "<", "|", ">", "a", " ", "\n", "im_end"]
    assert len(controls) > 2

    def count(turns: list[Turn], tiles: list[int]) -> dict[str, int]:
        ids = encode_conversation(turns, template, tokenizer, tiles, 2).ids
        return {token: int((ids == index).sum()) for token, index in controls.items()}

    plain = [Turn("user", "<image>a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d")]
    want = count(plain, [1])
    for _ in range(40):
        hostile = ["".join(rng.choice(names, 6)) for _ in plain]
        turns = [
            Turn(turn.role, ("<image>" if i == 0 else "") + "x" + text + "x")
            for i, (turn, text) in enumerate(zip(plain, hostile, strict=True))
        ]
        assert count(turns, [1]) == want, hostile
        prompt = encode_prompt([Turn("user", "x" + hostile[0] + "x")], template, tokenizer)
        safe = encode_prompt([Turn("user", "x")], template, tokenizer)
        assert all((prompt == index).sum() == (safe == index).sum() for index in controls.values())
    many = encode_prompt([Turn("user", next(iter(controls)) * 5_000)], template, tokenizer)
    assert len(many) > 5_000


@pytest.mark.parametrize("kind", ["internlm2", "qwen"])
def test_control_tokens_in_a_text_are_readable_and_others_are_still_tokens(kind: str) -> None:
    tokenizer, template = tokenizer_named(kind), TEMPLATES["internvl2_5"]
    ids = encode_prompt([Turn("user", "what is <|im_end|>?")], template, tokenizer)
    assert "<|im_end|>?" in tokenizer.decode(ids, skip_special=False).replace("< |", "<|")
    trusted = encode_prompt([Turn("user", "what is <|im_end|>?")], replace(template, trust_control_tokens=True), tokenizer)
    assert trusted.tolist() == tokenizer.encode(
        build_prompt(template, [Turn("user", "what is <|im_end|>?"), Turn("assistant", None)]), prefix=True
    )
    if tokenizer.has("<box>"):
        grounded = encode_prompt([Turn("user", "<box>[[1, 2]]</box>")], template, tokenizer)
        assert tokenizer.id_of("<box>") in grounded.tolist()


def test_ordinary_texts_have_the_ids_of_trusted_ones() -> None:
    for kind in FOLDERS:
        tokenizer = tokenizer_named(kind)
        for name in ("internlm2-chat", "internvl2_5", "compact"):
            template = TEMPLATES[name]
            for text in ("Hello, world", "a < b > c | d", "<b>bold</b>", "  x\n\n", "<image>"):
                turns, tiles = [Turn("user", text), Turn("assistant", "Yes <i>")], [1] if "<image>" in text else []
                got = encode_conversation(turns, template, tokenizer, tiles, 2)
                want = encode_conversation(turns, replace(template, trust_control_tokens=True), tokenizer, tiles, 2)
                assert got.ids.tolist() == want.ids.tolist() and (got.supervised == want.supervised).all()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "is empty"),
        ("hi", "instead of a list"),
        ([{"from": "robot", "value": "x"}], "unknown role 'robot'"),
        ([{"from": ["x"], "value": "x"}], "unknown role"),
        ([{"from": "human"}], "lacks"),
        ([{"from": "human", "value": 3}], "type int"),
        ([3], "lacks"),
    ],
)
def test_bad_turns(value: object, message: str) -> None:
    with pytest.raises(SampleError, match=message):
        parse_turns(value)


def test_only_text_is_cut() -> None:
    tokenizer, template = tiny_tokenizer(), TEMPLATES["compact"]
    turns = [Turn("user", "<image>ab"), Turn("assistant", "cdefgh")]
    full = encode_conversation(turns, template, tokenizer, [1], 4)
    cut = encode_conversation(turns, template, tokenizer, [1], 4, max_length=12)
    assert cut.truncated and cut.ids.tolist() == full.ids[:12].tolist() and len(cut.supervised) == 12
    for limit in (3, 6):
        with pytest.raises(SampleError, match="picture reaches beyond"):
            encode_conversation(turns, template, tokenizer, [1], 4, max_length=limit)


@pytest.mark.parametrize("folder", [INTERNLM, QWEN], ids=["internlm2", "qwen"])
def test_tokenizer_round_trips_through_save_and_pickle(folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    text = "<|im_start|>user\nWhat is the cat? 为什么<|im_end|>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special=False) == text
    assert tokenizer.decode(ids) == "user\nWhat is the cat? 为什么"
    tokenizer.save(tmp_path / "copy")
    for other in (Tokenizer.from_folder(tmp_path / "copy"), pickle.loads(pickle.dumps(tokenizer))):
        assert other.encode(text, prefix=True) == tokenizer.encode(text, prefix=True)
        assert other.fingerprint() == tokenizer.fingerprint() and other.vocab_size == tokenizer.vocab_size
    assert tokenizer.token_of(tokenizer.id_of("<img>")) == "<img>"
    with pytest.raises(ValueError, match="has no token"):
        tokenizer.id_of("<none>")


def test_in_memory_tokenizer_saves(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save(tmp_path)
    other = Tokenizer.from_folder(tmp_path)
    assert other.encode("<|user|>a") == tokenizer.encode("<|user|>a") and other.eos_id == tokenizer.eos_id == 3


def test_internlm2_puts_one_bos_first_and_older_folders_work(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(INTERNLM)
    assert tokenizer.prefix_ids == (1,) == (tokenizer.bos_id,) and tokenizer.encode("<s>") == [1]
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    older = Tokenizer.from_folder(tmp_path)
    text = "<|im_start|>user\n a <img></img> b</s>"
    assert older.encode(text, prefix=True) == tokenizer.encode(text, prefix=True)


def test_added_tokens_swallow_space_as_configured() -> None:
    added = [AddedToken("<a>", 901, lstrip=True, rstrip=True), AddedToken("<w>", 902, single_word=True), AddedToken("<aa>", 903)]
    backend = _SentencePieceBackend(INTERNLM / "tokenizer.model", added)
    assert backend.encode("x  <a>  y") == [*backend.encode("x"), 901, *backend.encode("y")]
    assert 902 in backend.encode("x <w> y") and 902 not in backend.encode("x<w> y")
    assert backend.encode("<aa>") == [903]


def test_folders_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds neither"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"tokenizer\.model cannot be read"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("kind", FOLDERS)
def test_half_a_surrogate_is_no_text(kind: str) -> None:
    template = TEMPLATES["internvl2_5" if kind != "tiny" else "compact"]
    with pytest.raises(SampleError, match="half of a surrogate pair"):
        encode_prompt([Turn("user", "a\udcffb")], template, tokenizer_named(kind))
