"""`monovl chat`: a conversation in the terminal."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from monovl_jax.data.images import image_size
from monovl_jax.inference.compiling import compile_seconds, kept_where
from monovl_jax.inference.conversation import Conversation
from monovl_jax.inference.sampling import GREEDY, Sampling

HELP = """[bold]/image PATH[/]  attach a picture to the next question (again for several)
[bold]/reset[/]       forget the conversation
[bold]/save FILE[/]   write the conversation as JSON, in the form that `monovl train` reads
[bold]/help[/]        this list
[bold]/quit[/]        leave (or Ctrl-D)
Ctrl-C stops an answer. A question of several lines: end a line with \\\\."""


def printable(text: str) -> str:
    """Text of a model without control characters: an answer must not move the cursor or recolour the terminal."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


class Chat:
    """The commands and answers of a terminal chat.

    Args:
      read: gives the next line of input; raises EOFError at its end.
    """

    def __init__(
        self,
        conversation: Conversation,
        console: Console,
        read: Callable[[], str],
        max_new_tokens: int = 512,
        sampling: Sampling = GREEDY,
    ):
        self.conversation, self.console, self._read = conversation, console, read
        self.max_new_tokens, self.sampling = max_new_tokens, sampling
        self.images: list[Path] = []

    def run(self) -> None:
        """Talks until `/quit` or the end of input."""
        self.console.print("[dim]Ask something. /image PATH attaches a picture, /help lists the rest.[/]")
        while True:
            try:
                line = self._line()
            except EOFError:
                return
            except KeyboardInterrupt:
                self.console.print("[dim](/quit leaves)[/]")
                continue
            if not line:
                continue
            try:
                if line.startswith("/"):
                    if not self.command(line):
                        return
                else:
                    self.answer(line)
            except (ValueError, OSError) as error:  # SampleError and ContextFull among them
                self.console.print(f"[red]{escape(printable(str(error)))}[/]")

    def _line(self) -> str:
        lines = [self._read()]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self._read())
        return "\n".join(lines).strip()

    def command(self, line: str) -> bool:
        """Does what a line that begins with `/` asks for; False to leave."""
        name, _, rest = line.partition(" ")
        rest = rest.strip().strip("'\"")
        if name == "/quit":
            return False
        if name == "/help":
            self.console.print(HELP)
        elif name == "/reset":
            self.conversation.reset()
            self.images = []
            self.console.print("[dim]forgotten[/]")
        elif name == "/image" and rest:
            path = Path(rest).expanduser()
            width, height = image_size(path)
            self.images.append(path)
            self.console.print(f"[dim]{escape(path.name)}, {width} x {height}, goes with the next question[/]")
        elif name == "/save" and rest:
            self.save(Path(rest).expanduser())
        elif name in ("/image", "/save"):
            self.console.print(f"[red]{name} needs a path[/]")
        else:
            self.console.print(f"[red]there is no command {escape(name)}; /help lists them[/]")
        return True

    def answer(self, question: str) -> None:
        """Prints the answer as it is made. Pictures that were attached stay attached when the question cannot be asked."""
        compiled = compile_seconds()
        stream = self.conversation.ask(question, list(self.images), self.max_new_tokens, self.sampling)
        try:
            with self.console.status("reading (the first time this compiles)"):
                piece = next(stream, "")
            self.images = []
            spent = compile_seconds() - compiled
            if spent > 0.5:
                self.console.print(f"[dim]compiled for {spent:.1f} s; {escape(kept_where())}[/]")
            while piece:
                self.console.print(printable(piece), end="", markup=False, highlight=False, soft_wrap=True)
                piece = next(stream, "")
            self.console.print()
        except KeyboardInterrupt:
            stream.close()
            self.images = []
            self.console.print("\n[dim](stopped)[/]")

    def _beside(self, path: Path, image: Path, number: int) -> str:
        """The name of an image for a file at `path`: relative to its folder, into which an image from elsewhere is copied."""
        folder = path.parent.resolve()
        if image.resolve().is_relative_to(folder):
            return image.resolve().relative_to(folder).as_posix()
        copy = folder / f"{path.name}_images" / f"{number}{image.suffix}"
        copy.parent.mkdir(exist_ok=True)
        with open(image, "rb") as source, open(copy, "xb") as target:  # what is there belongs to somebody else
            shutil.copyfileobj(source, target)
        return copy.relative_to(folder).as_posix()

    def save(self, path: Path) -> None:
        """Writes the conversation, with its images beside it; refuses to replace a file."""
        if path.exists():
            self.console.print(f"[red]{escape(str(path))} exists; give another name[/]")
            return
        turns, images = [], []
        for exchange in self.conversation.exchanges:
            turns += [{"from": "human", "value": exchange.question}, {"from": "gpt", "value": exchange.answer}]
            images += [self._beside(path, Path(image), len(images) + i) for i, image in enumerate(exchange.images)]
        entry = {"conversations": turns} | ({"image": images} if images else {})
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        self.console.print(f"[dim]saved {len(self.conversation.exchanges)} question(s) to {escape(str(path))}[/]")
