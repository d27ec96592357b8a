"""`longrope eval MODEL --suite perplexity,needle --lengths 256,512 --scaling run/scaling.json`: measurements."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress, TaskID

from longrope.callbacks import Callbacks
from longrope.cli.common import (
    Attention,
    Data,
    Device,
    Dtype,
    Json,
    Model,
    OriginalLength,
    RemoteCode,
    Seed,
    messages,
    model_options,
    print_json,
    progress_bar,
    quiet_libraries,
)
from longrope.cli.evaluate_tables import show
from longrope.cli.watch import resume_command
from longrope.storage import check_output_file
from longrope.units import parse_length, parse_lengths

Lengths = Annotated[
    str | None,
    typer.Option(
        "--lengths", help="Context lengths in tokens: 256,512,1k. None for retention and open-llm, which measure in L."
    ),
]
Suites = Annotated[
    str, typer.Option("--suite", help="Any of perplexity, passkey, needle, ruler, retention, open-llm: with commas.")
]
Scaling = Annotated[Path | None, typer.Option("--scaling", help="A scaling.json; without it, the model as it is.")]
Against = Annotated[
    str,
    typer.Option(
        "--against",
        help="What to compare with: none,pi,ntk,ntk-critical,dynamic-ntk,yarn, checkpoint (the scaling it carries),"
        " second-pi,second-ntk,second-ntk-critical,second-yarn (that one stretched further),"
        " original (the model before it was extended), other-scaling.json.",
    ),
]
TargetLength = Annotated[
    str | None, typer.Option("--target-length", help="L' of the closed forms; default: the scaling's.")
]
Original = Annotated[
    str | None,
    typer.Option("--original", help="The model before it was trained, for 'original' and retention; default: MODEL."),
]
Samples = Annotated[
    int, typer.Option("--samples", min=1, help="Perplexity and retention: texts per length, one per document first.")
]
Stride = Annotated[
    int | None,
    typer.Option("--stride", min=1, help="Perplexity: a sliding window with this stride (the paper's is 256)."),
]
Trials = Annotated[
    int,
    typer.Option(
        "--trials", min=1, help="Passkeys per length, needles per depth and length, samples per RULER task and length."
    ),
]
Depths = Annotated[int, typer.Option("--depths", min=1, help="Needle: depths from 0 to 1.")]
Needles = Annotated[
    int | None,
    typer.Option("--needles", min=1, help="Needle: how many share a document; default: what leaves half of it text."),
]
RulerTasks = Annotated[
    str, typer.Option("--ruler-tasks", help="RULER: niah_single_1,…,vt,cwe,fwe,qa_1; default: all that need no file.")
]
QaFile = Annotated[Path | None, typer.Option("--qa-file", help="RULER: questions in SQuAD's format, for qa_1.")]
Threshold = Annotated[
    float, typer.Option("--threshold", help="RULER: the score an effective length has; 85.6 is the published one.")
]
Share = Annotated[
    float,
    typer.Option("--share", help="RULER: the same, as a share of the model's own score inside its original window."),
]
Tasks = Annotated[
    str,
    typer.Option("--tasks", help="Retention: lm-eval tasks, NAME or a YAML file, with the shots: arc_challenge:25,…"),
]
TaskLimit = Annotated[int | None, typer.Option("--task-limit", min=1, help="lm-eval: only the first questions.")]
TaskBatch = Annotated[int, typer.Option("--task-batch", min=1, help="lm-eval: texts at once.")]
AllowSeen = Annotated[
    bool,
    typer.Option("--allow-seen", help="Measure on documents that the search or training has seen; the results say so."),
]
Output = Annotated[Path | None, typer.Option("-o", "--output", help="Write the results as a new JSON file here.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with a run that was stopped: its -o NAME.json left NAME.cells.jsonl.")
]


def command(
    model: Model,
    lengths: Lengths = None,
    suite: Suites = "perplexity",
    data: Data = None,
    scaling: Scaling = None,
    against: Against = "",
    target_length: TargetLength = None,
    original: Original = None,
    samples: Samples = 10,
    stride: Stride = None,
    trials: Trials = 30,
    depths: Depths = 10,
    needles: Needles = None,
    ruler_tasks: RulerTasks = "",
    qa_file: QaFile = None,
    threshold: Threshold = 85.6,
    share: Share = 0.856,
    tasks: Tasks = "",
    task_limit: TaskLimit = None,
    task_batch: TaskBatch = 1,
    allow_seen: AllowSeen = False,
    out: Output = None,
    resume: Resume = False,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    attn_implementation: Attention = None,
    original_length: OriginalLength = None,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure a model with and without a scaling: perplexity, retrieval, RULER, and what is left of short texts."""
    parsed = parse_lengths(lengths) if lengths else []
    target = parse_length(target_length) if target_length else None
    if out is not None:
        check_output_file(out)
    from longrope.evaluation.config import EvalConfig, HarnessTask
    from longrope.evaluation.run import evaluate, log_path

    quiet_libraries()
    options = EvalConfig(
        samples=samples,
        stride=stride,
        trials=trials,
        depths=depths,
        needles=needles,
        ruler_tasks=tuple(_names(ruler_tasks)),
        qa_file=qa_file,
        threshold=threshold,
        share=share,
        tasks=tuple(map(HarnessTask.parse, _names(tasks))),
        task_limit=task_limit,
        task_batch=task_batch,
    )
    with progress_bar() as progress, _interruptible(None if out is None else log_path(out)):
        result = evaluate(
            model,
            data=data or [],
            lengths=parsed,
            suites=_names(suite),
            scaling=scaling,
            baselines=_names(against),
            config=options,
            target_length=target,
            original=original,
            seed=seed,
            allow_seen=allow_seen,
            output=out,
            resume=resume,
            load=model_options(dtype, device, attn_implementation, original_length, trust_remote_code),
            callbacks=_Bar(progress, progress.add_task("preparing", total=None, note="")),
        )
    for warning in result.settings.get("warnings", []):
        messages.print(f"longrope: warning: {warning}")
    if as_json:
        print_json(result.to_json())
    else:
        show(result.rows)


@dataclass
class _Bar(Callbacks):
    """The progress bar of an evaluation."""

    progress: Progress
    task: TaskID

    def on_eval_start(self, steps: int) -> None:
        self.progress.update(self.task, description="eval", total=steps)

    def on_eval_step(self) -> None:
        self.progress.advance(self.task)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


@contextmanager
def _interruptible(log: Path | None) -> Iterator[None]:
    """On Ctrl-C, say how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        if log is not None and log.exists():
            messages.print(f"finished tasks are kept in {log}; continue with: {resume_command()}")
        raise
