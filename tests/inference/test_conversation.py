"""Text conversations and the terminal chat."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from monovl_jax.data.chat import TEMPLATES, ChatTemplate, Turn, encode_prompt
from monovl_jax.data.errors import SampleError
from monovl_jax.data.tokenizer import Tokenizer
from monovl_jax.inference.chat import Chat, printable
from monovl_jax.inference.conversation import Conversation, TextStream
from monovl_jax.inference.prompts import Prompt
from monovl_jax.inference.session import ContextFull
from tests.data.helpers import save_picture
from tests.inference.helpers import SmallModel, V, quick, small_model

__all__ = ["quick"]  # a fixture
NEW = 6


def talk(context: int | None = None) -> Conversation:
    return Conversation(small_model(), small_model().generator, context=context)


# ---- text


def bytes_tokenizer() -> Tokenizer:
    """One token per byte."""
    return Tokenizer.from_tokenizers(_with_decoder(Backend(models.BPE(vocab={f"<0x{b:02X}>": b for b in range(256)}, merges=[]))))


def _with_decoder(backend: Any) -> Any:
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return backend


@pytest.mark.parametrize("text", ["né 語 🦊!", "  spaces  inside\n", "", "\n\n", "a"])
@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_text_in_pieces(text: str, size: int) -> None:
    """Never half a character, and together the text without the white space around it."""
    ids, stream = np.frombuffer(text.encode(), np.uint8).astype(np.int32), TextStream(bytes_tokenizer())
    pieces = [stream.feed(ids[at : at + size]) for at in range(0, len(ids), size)]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join([*pieces, stream.end()]) == text.strip()


def test_bytes_that_are_no_text_come_at_the_end() -> None:
    stream = TextStream(bytes_tokenizer())
    assert stream.feed(np.array([0xE8, 0xAA], np.int32)) == ""
    assert set(stream.end()) == {"\ufffd"}


@pytest.mark.parametrize("broken", [b"\xe5", b"\xff\xfe", "好".encode()[:2]])
@pytest.mark.parametrize("size", [1, 3, 50])
def test_what_follows_a_broken_character_is_not_lost(broken: bytes, size: int) -> None:
    """A ByteFallback decoder takes the good bytes before a broken one for broken too."""
    data = "hi 好".encode() + broken + b" and the rest"
    ids, stream = np.frombuffer(data, np.uint8).astype(np.int32), TextStream(bytes_tokenizer())
    text = "".join([*(stream.feed(ids[at : at + size]) for at in range(0, len(ids), size)), stream.end()])
    assert text.startswith("hi 好\ufffd") and text.endswith("\ufffd and the rest")


# ---- conversations


def test_the_tokens_of_a_conversation_are_those_of_its_template(tmp_path: Path) -> None:
    """Two questions, a picture with the second: as `encode_prompt` writes the whole of it."""
    save_picture(tmp_path / "a.png", (32, 32))
    made, model = talk(), small_model()
    ids = []
    for question, images in (("hello?", []), ("what?", [tmp_path / "a.png"])):
        assert len([*made.ask(question, images, NEW)])
        ids.append(made.session.tokens)
    answers = [ids[0][-NEW:], ids[1][-NEW:]]
    head = encode_prompt([Turn("user", "hello?")], model.template, model.tokenizer)
    np.testing.assert_array_equal(ids[0], [*head, *answers[0]])
    tail = encode_prompt([Turn("user", "<image>what?")], model.template, model.tokenizer, [1], V)
    np.testing.assert_array_equal(ids[1], [*ids[0], model.tokenizer.id_of("<|end|>"), *tail, *answers[1]])
    assert [(e.question, e.images) for e in made.exchanges] == [("hello?", ()), ("<image>what?", (str(tmp_path / "a.png"),))]
    assert made.exchanges[1].answer == model.tokenizer.decode(answers[1]).strip()


def test_a_system_message_comes_once() -> None:
    """With a template that has one: the second turn begins with the end of the answer, not with the system message again."""

    class WithSystem(SmallModel):
        @property
        def template(self) -> ChatTemplate:
            return TEMPLATES["phi3-chat"]

    small = small_model()
    made = Conversation(WithSystem(small.tokenizer, small.config, small.generator), small.generator, system="be kind")

    def text(prompt: Prompt) -> str:
        return small.tokenizer.decode(prompt.ids, skip_special=False)

    first = made.prompt("hi")[1]
    assert text(first) == "<|system|>\nbe kind<|end|><|user|>\nhi<|end|><|assistant|>\n"
    made.session.tokens = first.ids
    assert text(made.prompt("again")[1]) == "<|end|><|user|>\nagain<|end|><|assistant|>\n"


def test_text_alone_is_answered_as_by_the_generator() -> None:
    model = small_model()
    (want,) = model.generator([model.prompt("hello?", [])], NEW)
    assert "".join(talk().ask("hello?", max_new_tokens=NEW)) == model.tokenizer.decode(want).strip()


def test_what_cannot_be_asked_changes_nothing(tmp_path: Path) -> None:
    made = talk(context=40)
    for question, images in ((" ", []), ("what?", [tmp_path / "missing.png"]), ("<image><image>", [])):
        with pytest.raises(SampleError):
            [*made.ask(question, images, NEW)]
    with pytest.raises(ContextFull):
        [*made.ask("x" * 60, [], NEW)]
    assert not made.exchanges and not len(made.session.tokens)


# ---- the terminal


def chat(lines: Iterable[str | type[BaseException]], **options: Any) -> tuple[Chat, str]:
    """A chat with these lines typed, and what was printed."""
    out, typed = io.StringIO(), iter(lines)

    def read() -> str:
        line = next(typed, EOFError)
        if isinstance(line, str):
            return line
        raise line

    made = Chat(talk(**options), Console(file=out, width=200), read, max_new_tokens=NEW)
    made.run()
    return made, out.getvalue()


def test_a_chat(tmp_path: Path) -> None:
    save_picture(tmp_path / "a b.png")
    made, out = chat(
        [f"/image '{tmp_path / 'a b.png'}'", "what is this?", "", "and\\", "now?", f"/save {tmp_path / 'talk.json'}", "/quit", "never"]
    )
    assert "a b.png, 32 x 16" in out and "saved 2 question(s)" in out
    questions = [e.question for e in made.conversation.exchanges]
    assert questions == ["<image>what is this?", "and\nnow?"] and not made.images
    for exchange in made.conversation.exchanges:
        assert printable(exchange.answer) in out
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [t["from"] for t in saved["conversations"]] == ["human", "gpt"] * 2 and saved["image"] == ["a b.png"]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_saved_chat_is_training_data(tmp_path: Path) -> None:
    from monovl_jax.data.chat import parse_turns

    chat(["hello?", f"/save {tmp_path / 'talk.json'}"])
    assert [t.role for t in parse_turns(json.loads((tmp_path / "talk.json").read_text())["conversations"])] == ["user", "assistant"]


def test_images_from_elsewhere_are_copied_beside_a_saved_chat(tmp_path: Path) -> None:
    save_picture(tmp_path / "far/a.png")
    (tmp_path / "near").mkdir()
    chat([f"/image {tmp_path / 'far/a.png'}", "what?", f"/save {tmp_path / 'near/talk.json'}"])
    (name,) = json.loads((tmp_path / "near/talk.json").read_text())["image"]
    assert name == "talk.json_images/0.png"
    first = (tmp_path / "far/a.png").read_bytes()
    assert (tmp_path / "near" / name).read_bytes() == first

    # another chat's images, and a user's own, stay as they are
    save_picture(tmp_path / "far/b.png", (20, 20))
    (tmp_path / "near/mine.json_images").mkdir()
    (tmp_path / "near/mine.json_images/0.png").write_bytes(b"mine")
    for file in ("talk.jsonl", "mine.json"):
        _, out = chat([f"/image {tmp_path / 'far/b.png'}", "what?", f"/save {tmp_path / 'near' / file}"])
    assert (tmp_path / "near" / name).read_bytes() == first
    assert (tmp_path / "near/mine.json_images/0.png").read_bytes() == b"mine" and not (tmp_path / "near/mine.json").exists()
    assert "File exists" in out.replace("\n", " ")


def test_mistakes_in_a_chat(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("x")
    made, out = chat(
        [
            "/image",
            "/image [red]no.png",
            "/nothing",
            f"/save {tmp_path / 'there'}",
            "<image>?",
            "/save /no/such/folder/x",
            "/help",
            KeyboardInterrupt,
        ]
    )
    for words in (
        "/image needs a path",
        "[red]no.png does not exist",
        "no command /nothing",
        "there exists",
        "write one <image> per picture",
    ):
        assert words in out
    assert (tmp_path / "there").read_text() == "x" and not made.conversation.exchanges
    assert "(/quit leaves)" in out and "/reset" in out and "No such file" in out


def test_pictures_stay_attached_until_they_are_asked_about(tmp_path: Path) -> None:
    save_picture(tmp_path / "a.png")
    made, out = chat([f"/image {tmp_path / 'a.png'}", "x" * 200], context=60)
    assert "leaves none of the context of 60" in out and len(made.images) == 1
    made, _ = chat([f"/image {tmp_path / 'a.png'}", "/reset"])
    assert not made.images


def test_ctrl_c_stops_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = Conversation.ask

    def interrupted(*args: Any) -> Any:
        stream = ask(*args)
        yield next(stream)
        stream.close()
        raise KeyboardInterrupt

    monkeypatch.setattr(Conversation, "ask", interrupted)
    made, out = chat(["hello?", "/help"])
    assert "(stopped)" in out and "/reset" in out and len(made.conversation.exchanges) == 1


def test_answers_do_not_steer_the_terminal() -> None:
    assert printable("a\x1b[31mb\x07\n\tc\x9b") == "a[31mb\n\tc"
