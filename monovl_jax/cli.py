"""`monovl <command>`: parse, call, print. No logic."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from monovl_jax.data.commands import data
from monovl_jax.planning.commands import plan

Positional = tyro.conf.Positional


def parity(cases: Positional[tuple[Path, ...]], *, json_output: Annotated[bool, tyro.conf.arg(name="json")] = False) -> int:
    """Compare the model with recorded outputs of the PyTorch code (docs/parity.md).

    Exit code 1 on any FAIL, 2 on a case that is not understood.

    Args:
        cases: folders of recorded cases.
        json_output: print one JSON object instead of lines.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from monovl_jax.evaluation.parity import EXPECTED_ERRORS, run_case

    if not cases:
        print("monovl parity: give at least one case folder", file=sys.stderr)
        return 2
    results, failed, unknown = [], False, False
    for case in cases:
        try:
            checks = run_case(case)
        except EXPECTED_ERRORS as error:
            results.append({"case": str(case), "error": str(error)})
            print(f"monovl parity: {error}", file=sys.stderr)
            unknown = True
            continue
        rows = [dataclasses.asdict(c) for c in checks]
        for row in rows:
            row["max_abs_diff"] = row["max_abs_diff"] if math.isfinite(row["max_abs_diff"]) else None  # JSON has no NaN
        results.append({"case": str(case), "checks": rows})
        failed |= not all(c.passed for c in checks)
        if not json_output:
            for c in checks:
                note = f"  ({c.note})" if c.note else ""
                verdict, where = "PASS" if c.passed else "FAIL", f"{case.parent.name}/{case.name}"
                print(f"{verdict}  {where}  {c.name}  {c.max_abs_diff:.3g}  [{c.tolerance}]{note}")
    code = 1 if failed else 2 if unknown else 0
    if json_output:
        print(json.dumps({"cases": results, "exit_code": code}, indent=2))
    return code


def demo(*, run_dir: Path = Path("runs/demo"), quick: bool = False, seed: int = 0) -> int:
    """Train, score and report the whole job on the embedded world of pictures (docs/demo.md). Rerun to resume.

    Args:
        run_dir: where checkpoints, logs, metrics.json and report.html go.
        quick: a run of a minute or two that only shows that everything works.
        seed: of weights and data.
    """
    from monovl_jax.demo.run import demo as run
    from monovl_jax.training.checkpoint import RunError
    from monovl_jax.training.preemption import PreemptedError
    from monovl_jax.training.stages import RecipeError

    try:
        result = run(run_dir, quick, seed)
    except (RunError, RecipeError, ImportError, OSError) as error:
        print(f"monovl demo: {error}", file=sys.stderr)
        return 2
    except PreemptedError as stopped:
        print(f"monovl demo: {stopped}", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print("monovl demo: interrupted; start the same command again to go on", file=sys.stderr)
        return 130
    last = list(result["scores"])[-1]
    for task, value in result["scores"][last].items():
        others = f"no picture {value['blind']:.1f}, untrained {value['untrained']:.1f}; n {value['n']}"
        print(f"{last}  {task:14s} {value['exact']:5.1f}%  ({others})")
    print(f"report: {run_dir / 'report.html'}")
    return 0


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How answers are drawn.

    Args:
        temperature: 0 takes the likeliest token; else tokens are drawn.
        top_k: draw from the k likeliest only; 0 for all.
        top_p: draw from the likeliest that together have this probability.
        repetition_penalty: above 1 makes what the answer has already less likely.
        seed: of the draws.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0


Dtype = Literal["float32", "bfloat16"]

Step = int | Literal["latest"]

MOST = 1 << 20
"""Most rows of a batch, and most tokens of an answer."""


def generate(
    *,
    model: Path,
    prompt: str | None = None,
    image: tuple[Path, ...] = (),
    jsonl: Path | None = None,
    out: Path | None = None,
    image_root: Path | None = None,
    batch_size: int = 8,
    stage: str | None = None,
    step: Step | None = None,
    max_new_tokens: int = 64,
    dtype: Dtype | None = None,
    verify: bool = True,
    trust_control_tokens: bool = False,
    sampling: SamplingOptions = SamplingOptions(),
) -> int:
    """Answer one prompt about any number of pictures, or a file of prompts (docs/inference.md).

    Args:
        model: a run directory (runs/demo), an imported model, or a folder in the released layout.
        prompt: the question; `<image>` marks where a picture goes, by default all go before it.
        image: paths of pictures.
        jsonl: instead of a prompt, a file of them: {"prompt": ..., "image": ...} a line. Rerun the same command to go on.
        out: where the answers to --jsonl are written, a line each as they come.
        image_root: folder of the pictures of --jsonl; that of the file by default.
        batch_size: prompts of --jsonl answered together.
        stage: of a run directory, the stage whose model answers; the last finished one by default.
        step: of a run directory, also while it trains: a step checkpoint, or `latest` for what was saved last.
        max_new_tokens: longest answer.
        dtype: of the computation; float32 on CPU and bfloat16 elsewhere by default.
        verify: compare the digests of an imported model's files first.
        trust_control_tokens: a control token in a prompt (`<|im_end|>`) is one, as upstream has it; text by default.
    """
    from monovl_jax.data.errors import SampleError

    if (prompt is None) == (jsonl is None) or (jsonl is None) != (out is None) or (jsonl is not None and image):
        print("monovl generate: give --prompt (and --image), or --jsonl and --out", file=sys.stderr)
        return 2
    for name, value in (("batch-size", batch_size), ("max-new-tokens", max_new_tokens)):
        if not 1 <= value <= MOST:
            print(f"monovl generate: --{name} is {value}; give a number from 1 to {MOST}", file=sys.stderr)
            return 2
    try:
        chosen = _sampling(sampling)
        loaded, generator = _ready(model, stage, step, dtype, verify, trust_control_tokens)
        if prompt is not None:
            asked = loaded.prompt(prompt, list(image))
            print(loaded.answer(generator, [asked], max_new_tokens, chosen)[0])
            _tell_compiling()
            return 0
        assert jsonl is not None and out is not None
        return _generate_file(loaded, generator, jsonl, out, image_root, batch_size, max_new_tokens, chosen)
    except (ValueError, SampleError, OSError) as error:
        print(f"monovl generate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("monovl generate: stopped", file=sys.stderr)
        return 130


def _generate_file(loaded: Any, generator: Any, jsonl: Path, out: Path, root: Path | None, rows: int, most: int, sampling: Any) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from monovl_jax.inference.batch import answer_file

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("answers", total=None)
        summary = answer_file(
            loaded,
            generator,
            jsonl,
            out,
            max_new_tokens=most,
            sampling=sampling,
            batch_size=rows,
            image_root=root,
            report=lambda text: bar.console.print(text, markup=False, highlight=False),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print(f"{out}: {summary.answered} answered, {summary.skipped} there before, {summary.bad} bad lines")
    return 1 if summary.bad else 0


def chat(
    model: Positional[Path],
    *,
    stage: str | None = None,
    step: Step | None = None,
    max_new_tokens: int = 512,
    dtype: Dtype | None = None,
    verify: bool = True,
    trust_control_tokens: bool = False,
    sampling: SamplingOptions = SamplingOptions(),
) -> int:
    """Talk with a model in the terminal; /help lists what else it understands (docs/inference.md).

    Args:
        model: a run directory (runs/demo), an imported model, or a folder in the released layout.
        stage: of a run directory, the stage whose model answers; the last finished one by default.
        step: of a run directory, also while it trains: a step checkpoint, or `latest` for what was saved last.
        max_new_tokens: longest answer.
        dtype: of the computation; float32 on CPU and bfloat16 elsewhere by default.
        verify: compare the digests of an imported model's files first.
        trust_control_tokens: a control token in a question (`<|im_end|>`) is one, as upstream has it; text by default.
    """
    from rich.console import Console

    from monovl_jax.inference.chat import Chat
    from monovl_jax.inference.conversation import Conversation

    if not 1 <= max_new_tokens <= MOST:
        print(f"monovl chat: --max-new-tokens is {max_new_tokens}; give a number from 1 to {MOST}", file=sys.stderr)
        return 2
    try:
        chosen = _sampling(sampling)
        loaded, generator = _ready(model, stage, step, dtype, verify, trust_control_tokens)
    except (ValueError, OSError) as error:
        print(f"monovl chat: {error}", file=sys.stderr)
        return 2
    console = Console()
    Chat(Conversation(loaded, generator), console, lambda: console.input("[bold]> [/]"), max_new_tokens, chosen).run()
    return 0


def _sampling(options: SamplingOptions) -> Any:
    from monovl_jax.inference.sampling import Sampling

    return Sampling(**dataclasses.asdict(options))


def _ready(model: Path, stage: str | None, step: Step | None, dtype: Dtype | None, verify: bool, trust: bool) -> tuple[Any, Any]:
    """A loaded model and its generator; what they compile is kept on disk for the next time."""
    import jax
    import jax.numpy as jnp

    from monovl_jax.inference.compiling import compile_seconds, keep_programs
    from monovl_jax.model import Ops
    from monovl_jax.pretrained import from_pretrained

    keep_programs()
    compile_seconds()  # counts from here
    loaded = dataclasses.replace(from_pretrained(model, stage, step, verify), trust_control_tokens=trust)
    kind = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    return loaded, loaded.generator(Ops(dtype=jnp.dtype(kind).type))


def _tell_compiling() -> None:
    from monovl_jax.inference.compiling import compile_seconds, kept_where

    if (seconds := compile_seconds()) > 1:
        print(f"(compiling took {seconds:.1f} s; {kept_where()})", file=sys.stderr)


def train(
    recipe: Positional[str],
    *,
    data: Path,
    init: str | Path | None = None,
    init_stage: str | None = None,
    init_step: int | None = None,
    tokenizer: Path | None = None,
    run_dir: str | Path | None = None,
    stages: tuple[str, ...] = (),
    steps: int | None = None,
    seed: int | None = None,
    trainable: tuple[str, ...] = (),
    batch_size: int | None = None,
    accumulation: int | None = None,
    learning_rate: float | None = None,
    sequence_length: int | None = None,
    strict: bool = False,
    verify_images: bool = False,
    check: bool = False,
    dtype: Literal["float32", "bfloat16"] | None = None,
    remat: Literal["none", "save_projections", "full"] | None = None,
    checkpoint_every: int = 500,
    keep: int = 2,
    milestone_every: int | None = None,
    max_skipped: int = 5,
    stall_seconds: float = 300.0,
    preemption_exit_code: int = 143,
    profile: str | None = None,
    xla_option: tuple[str, ...] = (),
    threads: int = 4,
    index_dir: Path | None = None,
    mesh_data: Annotated[int, tyro.conf.arg(name="mesh.data")] = -1,
    mesh_fsdp: Annotated[int, tyro.conf.arg(name="mesh.fsdp")] = 1,
    mesh_tensor: Annotated[int, tyro.conf.arg(name="mesh.tensor")] = 1,
    distributed: bool | None = None,
    trust_control_tokens: bool = False,
) -> int:
    """Train a recipe on your own pictures and conversations (docs/training.md). Rerun the same command to resume.

    Args:
        recipe: evip, evip_plus_plus, sft, sft:lora, or FILE.py:NAME with a Recipe or a function that gives one.
        data: META.json, which lists the data sets.
        init: weights to start from, a run directory (or gs://...) or a folder in the released layout; random ones without it.
        init_stage: of a run directory, the stage to start from; its last finished one by default.
        init_step: of that stage, the step checkpoint whose parameters are taken; its optimizer state is dropped.
        tokenizer: a folder with tokenizer.json or tokenizer.model; that of --init by default.
        run_dir: where checkpoints and logs go, a folder or gs://...; runs/NAME of the recipe by default.
        stages: only these stages of the recipe.
        steps: of every stage, instead of the recipe's.
        seed: of random weights and of the order of the data, instead of the recipe's.
        trainable: regexes over parameter paths, instead of the recipe's; everything else is frozen.
        batch_size: rows of a step, instead of the recipe's.
        accumulation: micro-batches a step, instead of the recipe's.
        learning_rate: the peak, instead of the recipe's.
        sequence_length: tokens of a row, instead of the recipe's.
        strict: stop at the first bad sample instead of leaving it out.
        verify_images: decode every picture before training, not only its header.
        check: look at recipe, weights and data, make the first batches, train nothing.
        dtype: of the computation; float32 on CPU and bfloat16 elsewhere by default.
        remat: what the backward pass computes again; none on CPU and save_projections elsewhere by default.
        checkpoint_every: steps between checkpoints.
        keep: checkpoints that stay, the last ones.
        milestone_every: steps between checkpoints that stay for good, a multiple of checkpoint_every.
        max_skipped: updates in a row that are not finite, after which the run stops.
        stall_seconds: a wait for data, device, disk or another host that is reported.
        preemption_exit_code: of a run that SIGTERM stopped, after it has saved.
        profile: START:STEPS, the steps to trace into the run directory.
        xla_option: NAME=VALUE, compiler options beside or instead of those for this kind of device; NAME= leaves one out.
        threads: that decode pictures; they change no batch.
        index_dir: where the indices of the data are kept, for several runs to share; in the run directory by default.
        mesh_data: devices among which rows are divided and parameters copied (docs/parallelism.md); -1 takes what the others leave.
        mesh_fsdp: devices among which rows and parameters are divided.
        mesh_tensor: devices among which heads, hidden units and vocabulary are divided.
        distributed: join the processes of other hosts before anything else; found out from the environment by default.
        trust_control_tokens: a control token in a text (`<|im_end|>`) is one, as upstream has it; text by default.
    """
    from monovl_jax.recipes import launch
    from monovl_jax.training.preemption import PreemptedError

    for name, right, value, wanted in (
        ("stall-seconds", 0 < stall_seconds < math.inf, stall_seconds, "a positive number"),
        ("preemption-exit-code", 0 <= preemption_exit_code <= 255, preemption_exit_code, "a number from 0 to 255"),
        ("threads", 1 <= threads <= 1024, threads, "a number from 1 to 1024"),
    ):
        if not right:
            print(f"monovl train: --{name} is {value}; give {wanted}", file=sys.stderr)
            return 2

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        job = launch.prepare(
            recipe,
            data,
            init=init,
            init_stage=init_stage,
            init_step=init_step,
            tokenizer=tokenizer,
            run_dir=run_dir,
            stages=stages,
            steps=steps,
            seed=seed,
            trainable=trainable,
            batch_size=batch_size,
            accumulation=accumulation,
            learning_rate=learning_rate,
            sequence_length=sequence_length,
            strict=strict,
            verify_images=verify_images,
            dtype=dtype,
            remat=remat,
            threads=threads,
            index_dir=index_dir,
            mesh=(mesh_data, mesh_fsdp, mesh_tensor),
            distributed=distributed,
            trust_control_tokens=trust_control_tokens,
            say=say,
        )
        options = launch.run_options(profile, xla_option, say)
        options |= dict(keep=keep, milestone_every=milestone_every, max_skipped=max_skipped, stall_seconds=stall_seconds)
        records = job.check() if check else job.run(checkpoint_every, **options)
    except PreemptedError as stopped:
        print(f"monovl train: {stopped}", file=sys.stderr)
        return preemption_exit_code
    except launch.EXPECTED_ERRORS as error:
        print(f"monovl train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("monovl train: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    for stage, record in (records or {}).items():
        print(f"{stage}  {record['steps']} steps  {record['seconds']:.0f} s  loss {record['loss']:.4f}")
    return 0


def convert_import(src: Positional[Path], dst: Positional[Path], *, dtype: Literal["float32", "bfloat16", "float16"] | None = None) -> int:
    """Released PyTorch weights to an Orbax folder of ours.

    Args:
        src: a folder with config.json and safetensors.
        dst: a new folder.
        dtype: of every tensor; as stored by default.
    """
    from monovl_jax.convert.importer import import_model

    return _converted("import", lambda progress: import_model(src, dst, dtype, progress))


def convert_export(
    src: Positional[Path],
    dst: Positional[Path],
    *,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    shard_gb: float = 5.0,
    stage: str | None = None,
    step: Step | None = None,
    verify: bool = True,
) -> int:
    """An imported model or a training run to the released layout, for PyTorch.

    Args:
        src: a folder that `convert import` or `convert init` made, or a run directory.
        dst: a new folder.
        dtype: of every tensor; as stored by default.
        shard_gb: largest file, in 10^9 bytes.
        stage: of a run, the stage whose model is written; the last finished one by default.
        step: of a run, also while it trains: a step checkpoint, or `latest` for what was saved last.
        verify: compare the digests of an imported model's files first.
    """
    from monovl_jax.convert.folders import missing_code
    from monovl_jax.pretrained import export

    code = _converted("export", lambda progress: export(src, dst, dtype, shard_gb, stage, step, verify, progress=progress))
    if code == 0 and (absent := missing_code(dst)):
        print(f"note: {dst} names code that {src} does not have; transformers needs {', '.join(absent)} copied there", file=sys.stderr)
    return code


def convert_init(
    llm: Positional[Path],
    dst: Positional[Path],
    *,
    model: str = "mono_internvl_2b",
    vision: Path | None = None,
    seed: int = 0,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
) -> int:
    """A plain language model (InternLM2 or Qwen2) to the starting point of stage S1.1: visual experts are copies of its layers.

    Args:
        llm: the language model's folder.
        dst: a new folder.
        model: released size whose vision path and experts are taken; the decoder's sizes come from the language model.
        vision: a released folder whose patch embedding is taken; a random one by default.
        seed: of what is random.
        dtype: of every tensor; that of the language model by default.
    """
    from monovl_jax.config import named_config
    from monovl_jax.convert.init import init_model

    return _converted("init", lambda progress: init_model(llm, dst, named_config(model), vision, seed, dtype, progress))


def convert_inspect(src: Positional[Path], *, verify: bool = True) -> int:
    """What is in a model folder: sizes, dtypes, the table of names, what is missing or unknown. Exit code 1 when anything is.

    Args:
        src: a released folder, an imported model, or an Orbax folder of parameters.
        verify: compare the digests of an imported model's files too, which reads all of them.
    """
    from monovl_jax.convert.inspect import inspect_model

    try:
        found = inspect_model(src, verify=verify)
    except (ValueError, OSError) as error:
        print(f"monovl convert inspect: {error}", file=sys.stderr)
        return 2
    print(found.text())
    return 1 if found.problems else 0


def _converted(name: str, work: Callable[[Any], Path]) -> int:
    from monovl_jax.convert.progress import progress_bar

    try:
        with progress_bar(name) as progress:
            made = work(progress)
    except (ValueError, OSError) as error:
        print(f"monovl convert {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"monovl convert {name}: stopped; nothing was written", file=sys.stderr)
        return 130
    print(made)
    return 0


def convert(
    command: Annotated[int, tyro.conf.subcommand("import", constructor=convert_import)]
    | Annotated[int, tyro.conf.subcommand("export", constructor=convert_export)]
    | Annotated[int, tyro.conf.subcommand("init", constructor=convert_init)]
    | Annotated[int, tyro.conf.subcommand("inspect", constructor=convert_inspect)],
) -> int:
    """Weights in and out (docs/conversion.md)."""
    return command


def checkpoints_ls(run_dir: Positional[str]) -> int:
    """What lies in a run directory: every base, step checkpoint and final, with size. Exit code 1 when the record of one is damaged.

    Args:
        run_dir: of `monovl train`; a folder, or gs://...
    """
    from monovl_jax.training.inventory import checkpoints
    from monovl_jax.training.store import RunError

    try:
        entries = checkpoints(run_dir)
    except (RunError, OSError) as error:
        print(f"monovl checkpoints ls: {error}", file=sys.stderr)
        return 2
    for entry in entries:
        print(entry.line())
    return 1 if any(entry.damage for entry in entries) else 0


def checkpoints_verify(run_dir: Positional[str]) -> int:
    """Read every checkpoint of a run back and compare its bits with those that were written. Exit code 1 when one is damaged.

    Args:
        run_dir: of `monovl train`; a folder, or gs://...
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from monovl_jax.training.inventory import verify
    from monovl_jax.training.store import RunError

    damaged = False
    try:
        for verdict in verify(run_dir, lambda text: print(f"reading {text}", file=sys.stderr, flush=True)):
            damaged |= bool(verdict.problems)
            print(verdict.line(), flush=True)
    except (RunError, OSError) as error:
        print(f"monovl checkpoints verify: {error}", file=sys.stderr)
        return 2
    return 1 if damaged else 0


def checkpoints(
    command: Annotated[int, tyro.conf.subcommand("ls", constructor=checkpoints_ls)]
    | Annotated[int, tyro.conf.subcommand("verify", constructor=checkpoints_verify)],
) -> int:
    """What a run has saved, and whether it is whole (docs/checkpoints.md)."""
    return command


COMMANDS = {
    "parity": parity,
    "demo": demo,
    "generate": generate,
    "chat": chat,
    "train": train,
    "plan": plan,
    "convert": convert,
    "checkpoints": checkpoints,
    "data": data,
}


COMPUTING = ("demo", "train", "generate", "chat")
"""Commands that compute for longer than a restart takes."""


def _prefer_huge_pages() -> None:
    """Restarts a command that computes, once, with huge pages for malloc on Linux: XLA's CPU buffers are large and short-lived, and page
    faults on them can cost as much as the arithmetic (docs/performance.md). Python's own options (-X, -W, -m) go along.

    Not under a debugger or a tracer, and not where GLIBC_TUNABLES is set.
    """
    wanted = len(sys.argv) > 1 and sys.argv[1] in COMPUTING and not {"-h", "--help"} & set(sys.argv)
    watched = sys.gettrace() is not None or sys.getprofile() is not None
    if sys.platform == "linux" and wanted and not watched and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def quiet_orbax() -> None:
    """Lets one sentence tell what is wrong with a checkpoint.

    Orbax logs pages about it. And it gives up at the first array that cannot be read; what it had begun then finds its event loop closed,
    and Python prints a trace of that from another thread.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    told = sys.unraisablehook

    def tell(unraisable: Any) -> None:
        if not (isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"):
            told(unraisable)

    sys.unraisablehook = tell


def main() -> None:
    """Entry point of the console script."""
    _prefer_huge_pages()
    quiet_orbax()
    plain = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes)  # `convert import --dtype`, not `command:import --command.dtype`
    words = "Monolithic vision-language models in JAX."
    try:
        code = tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="monovl", description=words, config=plain)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has seen enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
