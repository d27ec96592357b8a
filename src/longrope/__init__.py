"""longrope: a checkpoint of any RoPE language model in, one with a longer context window out, and the evidence.

    import longrope as lr
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-7B-Instruct", dtype="bfloat16", device_map="auto")
    tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen2.5-7B-Instruct")
    scaling = lr.search_scaling(model, tokenizer, target_length="128k", data="books/", output_dir="run")
    lr.apply_scaling(model, scaling)

Models are plain transformers models, folders, GGUF files or hub names; lengths are an int or "128k". A fault that a
caller can mend is a `LongRopeError`. Every name below is imported when it is first used.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors; _PUBLIC says the same, as a test proves
    from longrope.callbacks import Callbacks as Callbacks
    from longrope.costs.plan import plan as plan
    from longrope.doctor.diagnose import diagnose as diagnose
    from longrope.errors import LongRopeError as LongRopeError
    from longrope.evaluation.config import EvalConfig as EvalConfig
    from longrope.evaluation.perplexity import perplexity as perplexity
    from longrope.evaluation.results import EvalResults as EvalResults
    from longrope.evaluation.run import evaluate as evaluate
    from longrope.export.config import ExportConfig as ExportConfig
    from longrope.export.export import export_checkpoint as export_checkpoint
    from longrope.models.apply import apply_scaling as apply_scaling
    from longrope.models.apply import remove_scaling as remove_scaling
    from longrope.models.apply import scaled as scaled
    from longrope.models.config import LoadOptions as LoadOptions
    from longrope.models.generation.cache import prefill as prefill
    from longrope.models.generation.generate import generate as generate
    from longrope.models.inspect import inspect_model as inspect_model
    from longrope.models.scoring import token_nll as token_nll
    from longrope.rope.closed_form_scalings import llama3 as llama3
    from longrope.rope.closed_form_scalings import ntk as ntk
    from longrope.rope.closed_form_scalings import ntk_critical as ntk_critical
    from longrope.rope.closed_form_scalings import pi as pi
    from longrope.rope.closed_form_scalings import yarn as yarn
    from longrope.rope.geometry import RopeGeometry as RopeGeometry
    from longrope.rope.presets import preset as preset
    from longrope.rope.scaling import RopeScaling as RopeScaling
    from longrope.rope.scaling import Window as Window
    from longrope.rope.scaling import load_scaling as load_scaling
    from longrope.search.config import SearchConfig as SearchConfig
    from longrope.search.recover import recover_scaling as recover_scaling
    from longrope.search.run import search_scaling as search_scaling
    from longrope.standalone.api import LongRoPEModel as LongRoPEModel
    from longrope.standalone.api import load_data as load_data
    from longrope.train.config import FinetuneConfig as FinetuneConfig
    from longrope.train.finetune import finetune as finetune

    __version__: str

_PUBLIC = {
    "callbacks": ("Callbacks",),
    "costs.plan": ("plan",),
    "doctor.diagnose": ("diagnose",),
    "errors": ("LongRopeError",),
    "evaluation.config": ("EvalConfig",),
    "evaluation.perplexity": ("perplexity",),
    "evaluation.results": ("EvalResults",),
    "evaluation.run": ("evaluate",),
    "export.config": ("ExportConfig",),
    "export.export": ("export_checkpoint",),
    "models.apply": ("apply_scaling", "remove_scaling", "scaled"),
    "models.config": ("LoadOptions",),
    "models.generation.cache": ("prefill",),
    "models.generation.generate": ("generate",),
    "models.inspect": ("inspect_model",),
    "models.scoring": ("token_nll",),
    "rope.closed_form_scalings": ("llama3", "ntk", "ntk_critical", "pi", "yarn"),
    "rope.geometry": ("RopeGeometry",),
    "rope.presets": ("preset",),
    "rope.scaling": ("RopeScaling", "Window", "load_scaling"),
    "search.config": ("SearchConfig",),
    "search.recover": ("recover_scaling",),
    "search.run": ("search_scaling",),
    "standalone.api": ("LongRoPEModel", "load_data"),
    "train.config": ("FinetuneConfig",),
    "train.finetune": ("finetune",),
}
_MODULES = {name: module for module, names in _PUBLIC.items() for name in names}
_DEPRECATED = {
    "install": ("models.apply", "apply_scaling", "use apply_scaling"),
    "uninstall": ("models.apply", "remove_scaling", "use remove_scaling"),
    "generation": ("models.generation.generate", "generation", "use scaled, or generate"),
    "load_model": ("models.loading", "load_model", "give the model's name, or load it with transformers"),
    "load_tokenizer": ("models.loading", "load_tokenizer", "give the model's name, or load it with transformers"),
}
"""Names of the last release: (module, name there, advice). They go with the next one."""

__all__ = sorted(_MODULES)


if not TYPE_CHECKING:  # a type checker shall find a name that does not exist

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import version

            return version("longrope")
        if name in _DEPRECATED:
            module, now, advice = _DEPRECATED[name]
            warnings.warn(f"longrope.{name} is deprecated: {advice}", DeprecationWarning, stacklevel=2)
            return getattr(import_module(f"longrope.{module}"), now)
        if name not in _MODULES:
            raise AttributeError(f"module 'longrope' has no attribute {name!r}")
        value = getattr(import_module(f"longrope.{_MODULES[name]}"), name)
        globals()[name] = value  # the next look-up does not come here
        return value


def __dir__() -> list[str]:
    return [*__all__, "__all__", "__doc__", "__version__"]
