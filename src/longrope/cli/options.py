"""The options of the verbs beside their configurations: name, help and group, each written once.

The options of a configuration are made from its settings (`verb.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter
from cyclopts.types import NonNegativeInt, PositiveInt

from longrope.cli.verb import OUTPUT, Options, split_names
from longrope.errors import LongRopeError
from longrope.evaluation.config import EvalConfig
from longrope.evaluation.server.config import ServerOptions
from longrope.models.config import LoadOptions
from longrope.search.config import RayOptions
from longrope.storage import read_json
from longrope.trackers import check_trackers

if TYPE_CHECKING:
    from longrope.data.sources import TextSource
    from longrope.evaluation.config import EvalConfig
    from longrope.train.config import LoraConfig


def option(help: str, *names: str, **given: Any) -> Parameter:
    """An option with its help; `names` where it is not called like the verb's parameter."""
    return Parameter(name=names or None, help=" ".join(help.split()), **given)


def out(help: str) -> Parameter:
    """The option -o of a verb."""
    return option(help, "-o", "--output")


def _needs_tensorboard(_kind: Any, log_dir: Path | None) -> None:
    """Refuse --log-dir before any work where tensorboard is not installed."""
    if log_dir is not None and find_spec("tensorboard") is None:
        raise LongRopeError(
            "`log_dir` needs TensorBoard, which is not installed",
            code="missing-dependency",
            hint='pip install "tensorboard"',
        )


def _needs_trackers(_kind: Any, names: str) -> None:
    """Refuse a tracker that is not installed before any work."""
    check_trackers(split_names(names or None, "report_to"))


# Shared by several verbs.

Model = Annotated[
    str, option("A model folder, the folder of a run, a GGUF file, a hub name (owner/model), 'tiny' or 'tiny-512x'.")
]
Data = Annotated[
    list[str] | None,
    option(
        """Text: .txt, .jsonl or .json (also .gz, .xz, .zst), .parquet, a folder, book:NAME or hf:NAME. May be
        repeated. Default for the embedded models: shipped books.""",
        metavar="TEXT",
    ),
]
Field = Annotated[
    list[str] | None,
    option(
        """The field of rows that holds their text, or chat messages for the tokenizer's template; a.b is field b of a.
        May be repeated: the first that a row has. Default: text, else messages.""",
        metavar="NAME",
    ),
]
TargetLength = Annotated[str, option("The new window L' in tokens: 4096, 128k, 2M.", metavar="TOKENS")]
Scaling = Annotated[Path | None, option("The scaling.json to apply; a run folder brings its own.")]
Resume = Annotated[bool, option("Continue the interrupted run in the output folder.")]
Seed = Annotated[NonNegativeInt, option("The random seed.")]
ReportTo = Annotated[
    str, option("Trackers to report to as well: wandb, trackio.", metavar="A,B", validator=_needs_trackers)
]
LogDir = Annotated[Path | None, option("Write TensorBoard scalars to this folder.", validator=_needs_tensorboard)]
Json = Annotated[
    bool, option("Print one JSON object on standard output and nothing else there.", "--json", group=OUTPUT)
]
LOADING = "Loading the model"
Load = Annotated[LoadOptions, Options(LOADING, place=5)]
ConfigOnly = Annotated[LoadOptions, Options(LOADING, only=("original_length", "trust_remote_code"), place=5)]
"""For verbs that read a model's config and no weights."""
ProofLoad = Annotated[
    LoadOptions,
    Options(
        LOADING,
        only=("device", "original_length", "trust_remote_code"),
        helps={"device": "The device of the proof: auto, cpu, cuda, cuda:1, …"},
        place=5,
    ),
]

# search

_DEVICES = "Several devices"
Ray = Annotated[RayOptions, Options(_DEVICES, place=4)]
_TORCHRUN = "torchrun --nproc-per-node P -m longrope …"


def _sharing(processes: str) -> Parameter:
    text = f"Processes that share every text, for texts longer than one device's memory: {processes}."
    return option(text, "--context-parallel", metavar="P", group=Group(_DEVICES, sort_key=4))


ShareTexts = Annotated[PositiveInt, _sharing(f"those that {_TORCHRUN} starts")]
ShareSearchTexts = Annotated[PositiveInt, _sharing(f"those of each worker, or those that {_TORCHRUN} starts")]

# eval

Lengths = Annotated[
    str | None,
    option(
        """Context lengths in tokens: 256,512,1k. Default: L, 2L, … L'. Not for retention and open-llm: they measure the
        original window.""",
        metavar="N,N,…",
    ),
]
Suites = Annotated[
    str,
    option("Any of perplexity, passkey, needle, ruler, retention, open-llm: with commas.", "--suite", metavar="A,B,…"),
]
Baselines = Annotated[
    str | None,
    option(
        """Methods to compare with: any of none, pi, ntk, ntk-critical, dynamic-ntk, yarn, checkpoint (its own
        scaling), second-pi, second-ntk, second-ntk-critical, second-yarn (that one stretched further), original (the
        model before it was extended), other-scaling.json.""",
        "--against",
        metavar="A,B,…",
    ),
]
Measured = Annotated[
    str,
    option(
        """A model folder, the folder of a run, a GGUF file, a hub name (owner/model), 'tiny' or 'tiny-512x'; or the
        address of a server with OpenAI's completions, http://localhost:8000/v1.""",
    ),
]
SuiteSettings = Annotated[EvalConfig, Options("Suites")]
Server = Annotated[ServerOptions, Options("A server as MODEL", place=4)]
OwnScaling = Annotated[Path | None, option("The scaling.json to measure. Default: the model as it is.")]
ClosedFormLength = Annotated[
    str | None,
    option(
        "The window L' that pi, ntk, yarn and the like are made for. Default: the scaling's, else the longest length.",
        metavar="TOKENS",
    ),
]
Original = Annotated[
    str | None, option("The model before it was trained, for 'original' and retention. Default: MODEL.")
]
AllowSeen = Annotated[bool, option("Measure on documents that the search or training has seen; the results say so.")]
Results = Annotated[Path | None, out("A new JSON file for the results.")]
ResumeCells = Annotated[bool, option("Go on with a run that was stopped: its -o NAME.json left NAME.cells.jsonl.")]

# finetune

TrainedScaling = Annotated[
    Path | None,
    option(
        "The scaling.json of a search, to train the model for. Default: the scaling that the model's checkpoint states."
    ),
]
Rank = Annotated[
    PositiveInt | None,
    option("LoRA: train updates of this rank, embeddings and norms, not all weights.", metavar="RANK"),
]
Alpha = Annotated[float | None, option("LoRA's alpha: updates are scaled by alpha / rank. Default: 16.")]
Adapter = Annotated[bool, option("LoRA: leave adapter/ for peft instead of merged weights.")]
Trainer = Annotated[
    Path | None, option("JSON with further TrainingArguments: fsdp, deepspeed, parallelism_config, …", metavar="FILE")
]
TrainLoad = Annotated[
    LoadOptions,
    Options(
        LOADING, helps={"device": "auto, cpu or cuda; more GPUs: torchrun --no-python longrope finetune …"}, place=5
    ),
]

# extend

_RECIPE, _COMPARISON = Group("A recipe", sort_key=1), Group("Comparison", sort_key=2)
OptionalModel = Annotated[
    str | None, option("A model folder, a GGUF file, a hub name, or 'tiny'. Default: tiny, or the recipe's own.")
]
Recipe = Annotated[
    str | None,
    option(
        """A recipe that ships (longrope, longrope2, quick, llama3-8b-128k, …) or a YAML file: its stages in place of a
        search alone. The same command goes on with a run that was stopped.""",
        group=_RECIPE,
    ),
]
DryRun = Annotated[bool, option("Check the recipe, print its plan, stop.", group=_RECIPE)]
OptionalLength = Annotated[
    str | None,
    option(
        "The new window L'. Default: 8 times the original window L, or the recipe's own longest target.",
        metavar="TOKENS",
    ),
]
AllowLossy = Annotated[bool, option("Export without the parts that the runtime cannot express, and name them.")]
EvalData = Annotated[
    list[str] | None, option("Text to compare on, other than that of the search.", metavar="TEXT", group=_COMPARISON)
]
EvalLengths = Annotated[
    str | None, option("Context lengths. Default: L, 2L, … L'.", "--lengths", metavar="N,N,…", group=_COMPARISON)
]
EvalSamples = Annotated[PositiveInt | None, option("Held-out texts per length. Default: 10.", group=_COMPARISON)]

# plan

_SEARCHES = Group("Searches", sort_key=2)
TRAINING = "Fine-tuning of your own in place of the papers'"
Methods = Annotated[
    list[str] | None, option("Only this method. May be repeated. Default: all.", metavar="METHOD", group=_SEARCHES)
]
Objective = Annotated[str | None, option("perplexity or needle.", group=_SEARCHES)]
LayerInputsOfPlan = Annotated[
    str,
    option("Inputs of layers in gradients: keep, offload, recompute; auto: the first that fits.", group=_SEARCHES),
]
Samples = Annotated[PositiveInt | None, option("Texts that are scored.", group=_SEARCHES)]
ContextParallel = Annotated[PositiveInt, option("Devices that share every text, and every row of training.")]


def sources(data: list[str] | None, field: list[str] | None) -> list[TextSource]:
    """The texts that --data and --field name."""
    from longrope.data.sources import as_sources

    return as_sources(data or [], field)


def chosen_suites(suites: str, config: EvalConfig, **about_texts: object) -> tuple[str, ...]:
    """The names in `suites`. Raises LongRopeError for a setting or an option about texts that none of them uses."""
    names = split_names(suites, "suites")
    config.refuse_unused(names)
    _refuse_unread(names, config, about_texts)
    return names


def _refuse_unread(suites: Sequence[str], config: EvalConfig, given: Mapping[str, object]) -> None:
    """Raise LongRopeError for an option about texts that is `given` where no suite reads any."""
    from longrope.evaluation.run import SUITES

    if any(name not in SUITES or SUITES[name].needs_text(config) for name in suites):
        return
    for name, value in given.items():
        if value:
            raise LongRopeError(
                f"`{name}` is about texts to measure on; found {', '.join(suites)} in `suites`, which reads none",
                code="setting-of-another-suite",
                hint="leave it out",
            )


def json_object(name: str, path: Path | None) -> dict[str, Any]:
    """The JSON object in the file that the option `name` names; empty without one."""
    try:
        return {} if path is None else read_json(path)
    except LongRopeError as error:
        raise error.within(f"`{name}`") from error


def lora_config(rank: int | None, alpha: float | None, adapter: bool) -> LoraConfig | None:
    """The settings of LoRA; None where all weights are trained."""
    from longrope.train.config import LoraConfig

    if rank is not None:
        return LoraConfig(rank=rank, merge=not adapter, **{} if alpha is None else {"alpha": alpha})
    if adapter:
        raise LongRopeError("`adapter` leaves what `lora` trains", code="invalid-setting", hint="add `lora=RANK`")
    if alpha is not None:
        raise LongRopeError("`lora_alpha` scales what `lora` trains", code="invalid-setting", hint="add `lora=RANK`")
    return None
