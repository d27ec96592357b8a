"""Prove that a change of the code changes no number of a search: the same searches before and after it, byte by byte.

Record the searches with the code as it was, then compare the code as it is now with them:

    python scripts/compare_searches.py record --src OLD/src --python .venv/bin/python --out RECORDED
    python scripts/compare_searches.py compare --recorded RECORDED --src src --python .venv/bin/python

The searches (`CASES`) are small ones of the embedded model, and some of a model that has a scaling. All go through the
command line, so that code may move as long as `longrope.cli.main:main` stays. `compare` asks of each search:

- run anew, it leaves the same log, the same scaling and the same summary;
- the recorded log, cut after half of its evaluations, is resumed to the same end;
- killed after a third of them and resumed, it comes to the same end too (`Case.killed`, one or two for each method).

The same means: every evaluation in the log byte for byte but for its checksum, which follows from it and which logs of
earlier versions have not, and all else as the same JSON text, but for what each output records of how it was run
(`CIRCUMSTANCES`).

Record and compare on one machine and in one environment: another CPU or torch gives other last bits.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self

LOG, SCALING, SUMMARY = "search.jsonl", "scaling.json", "search.json"
MANIFEST = "cases.json"
METHODS = ("longrope", "longrope2", "gradient", "hybrid", "cma")
EMBEDDED = "tiny"
EMBEDDED_FOLDER = "longrope/assets/tiny"  # under --src
CARRIED, UNORDERED = "carried", "carried-unordered"
CARRIED_CASE, UNORDERED_CASE = "gradient-512", "hybrid-perplexity"  # whose results they hold
TWO_STAGES = BEYOND = 640  # tokens: more than twice the window of the embedded model, and what the carried one has

SMALL = {
    "longrope": "--population 8 --iterations 3",
    "longrope2": "--population 8 --iterations 3",
    "gradient": "--steps 4",
    "hybrid": "--steps 4 --evaluations 22",
    "cma": "--evaluations 22",
}
"""How much each method does: enough for every kind of request that it makes, and no more."""

CHECKSUM = re.compile(rb', "crc32": "[0-9a-f]{8}"\}(?=\n?\Z)')  # at the end of a line of the log
CIRCUMSTANCES = {
    *("versions", "machine", "processor", "gpu", "commit", "command"),
    *("finished", "seconds", "resumed"),
}
"""Keys of the outputs that say when, where and how a search was run."""
POLL_SECONDS, KILL_ATTEMPTS, KILLED = 0.002, 3, "killed"


@dataclass(frozen=True)
class Case:
    """One search: `arguments` follow `longrope search`, all but -o. `killed`: it is also killed and resumed."""

    name: str
    arguments: list[str]
    killed: bool = False


def case(
    method: str, variant: str, options: str = "", *, length: int = 512, model: str = EMBEDDED, **kept: Any
) -> Case:
    """A small search by `method`. Options given here come last, and so win over the small ones."""
    text = f"{model} --target-length {length} --data book:an-american-tragedy --method {method} --samples 2"
    return Case(f"{method}-{variant}", f"{text} {SMALL[method]} {options}".split(), **kept)


CASES = (
    *(case(method, "perplexity", length=TWO_STAGES, killed=True) for method in METHODS if method != "longrope2"),
    case("longrope2", "perplexity", "--objective perplexity", killed=True),
    *(case(method, "needle", "--objective needle") for method in METHODS),
    case("gradient", "1024", length=1024),
    case("gradient", "512"),
    case("longrope", "needle-start", "--objective needle --needle-depth start"),
    case("gradient", "needle-depth", "--objective needle --needle-depth 0.3"),
    *(case(method, "seed", "--seed 7") for method in ("longrope", "longrope2", "gradient", "cma")),
    *(case(method, "start-tokens-search", "--start-tokens search") for method in METHODS if method != "longrope2"),
    case("hybrid", "start-tokens-4", "--start-tokens 4"),
    case("longrope", "racing", "--racing on --samples 4", killed=True),
    case("longrope", "racing-needle", "--racing on --samples 4 --objective needle"),
    case("longrope2", "racing", "--racing on --samples 4", killed=True),
    case("longrope2", "racing-perplexity", "--racing on --samples 4 --objective perplexity"),
    *(case(method, "critical-dim", "--critical-dim 18") for method in ("longrope", "longrope2", "gradient")),
    *(case(method, "knots-8", "--knots 8") for method in ("gradient", "hybrid", "cma")),
    case("cma", "knots-0", "--knots 0 --evaluations 28"),
    case("gradient", "learn-attention-factor", "--learn-attention-factor", length=TWO_STAGES),
    case("hybrid", "learn-attention-factor", "--learn-attention-factor"),
    *(case(method, "attention-factor-1", "--attention-factor 1") for method in ("longrope", "longrope2", "gradient")),
    case("cma", "attention-factor-yarn", "--attention-factor yarn"),
    case("gradient", "no-continuation", "--no-continuation", length=TWO_STAGES),
    *(case(method, "max-factor", "--max-factor 2.1") for method in METHODS if method != "longrope2"),
    case("longrope", "patience", "--patience 1 --iterations 9"),
    case("longrope2", "patience", "--patience 1 --iterations 9 --critical-dim 18"),
    case("gradient", "patience", "--patience 1 --steps 32 --learning-rate 2 --knots 4"),
    case("cma", "patience", "--patience 1 --evaluations 66"),
    case("longrope", "no-iterations", "--iterations 0"),
    case("longrope", "original-length", "--original-length 128"),
    case("gradient", "bfloat16", "--dtype bfloat16"),
    *(case(method, "carried", length=BEYOND, model=CARRIED, killed=method == "gradient") for method in METHODS),
    case("longrope", "carried-racing", "--racing on --samples 4", length=BEYOND, model=CARRIED),
    case("gradient", "carried-continued", "--attention-factor continued", length=BEYOND, model=CARRIED),
    case("cma", "carried-attention-factor-1", "--attention-factor 1", length=BEYOND, model=CARRIED),
    *(case(method, "carried-unordered", length=BEYOND, model=UNORDERED) for method in METHODS if method != "longrope2"),
)


class Searches:
    """Runs searches with the code under `src`, `jobs` at a time, each in a process of its own.

    Starting Python and importing torch takes longer than such a search, so it is done once for each job (`serve`), and
    every search is a fork of that process, with nothing of another one in it.
    """

    def __init__(self, src: Path, python: Path, jobs: int) -> None:
        """Exits unless it is this code that `python` imports: an installed package could be in its place."""
        self.src, self.jobs = src, jobs
        environment = os.environ | {"PYTHONPATH": str(src), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        command = [str(python), "-P", str(Path(__file__).resolve()), "serve"]  # -P: nothing beside it is imported
        pipe = subprocess.PIPE
        self._servers = [
            subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) for _ in range(jobs)
        ]
        self._idle: SimpleQueue[subprocess.Popen[str]] = SimpleQueue()
        for server in self._servers:
            found = self._answer(server)
            if not Path(found).resolve().is_relative_to(src.resolve()):
                sys.exit(f"expected longrope to be imported from {src}, found {found}")
            self._idle.put(server)

    def run(
        self, arguments: list[str], folder: Path, out: str, *, resume: bool = False, kill_at: int | None = None
    ) -> str | None:
        """Search in `folder`, into `folder/out`: paths in the outputs are relative, the same everywhere.

        None where it ended well, KILLED, or what went wrong. `kill_at`: it is killed as soon as its log has so many
        lines.
        """
        errors = folder / f"{out}.errors"
        words = ["search", *arguments, "-o", out, *(["--resume"] if resume else [])]
        request = {"arguments": words, "folder": str(folder), "errors": str(errors)}
        server = self._idle.get()
        try:
            assert server.stdin is not None
            server.stdin.write(json.dumps(request | {"log": f"{out}/{LOG}", "kill_at": kill_at}) + "\n")
            server.stdin.flush()
            code = int(self._answer(server))
        finally:
            self._idle.put(server)
        text = errors.read_text("utf-8", "replace").strip()
        errors.unlink()
        if code == -signal.SIGKILL and kill_at is not None:
            return KILLED
        return f"exit code {code}: {text.splitlines()[-1] if text else 'nothing on standard error'}" if code else None

    def _answer(self, server: subprocess.Popen[str]) -> str:
        assert server.stdout is not None
        line = server.stdout.readline()
        if not line:
            sys.exit("a process that runs the searches has ended; what it says is above")
        return line.strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            assert server.stdin is not None
            server.stdin.close()
            server.wait()


def serve() -> None:
    """Fork a search for every line on standard input and answer with its exit code, a signal's being negative.

    The first line of all says which package it is that searches.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401 - for the forks

    import longrope
    from longrope.cli.main import main as command_line

    print(longrope.__file__, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            os.chdir(request["folder"])
            nothing = os.open(os.devnull, os.O_RDWR)
            errors = os.open(request["errors"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            for target, source in enumerate((nothing, nothing, errors)):
                os.dup2(source, target)
            sys.argv = ["longrope", *request["arguments"]]
            command_line()
            sys.exit(0)
        log, kill_at = Path(request["folder"]) / request["log"], request["kill_at"]
        if kill_at is None:
            _, status = os.waitpid(child, 0)
        else:
            ended, status = os.waitpid(child, os.WNOHANG)
            while not ended:
                if log.exists() and log.read_bytes().count(b"\n") >= kill_at:
                    os.kill(child, signal.SIGKILL)
                    _, status = os.waitpid(child, 0)
                    break
                time.sleep(POLL_SECONDS)
                ended, status = os.waitpid(child, os.WNOHANG)
        print(os.waitstatus_to_exitcode(status), flush=True)


def record(searches: Searches, out: Path, cases: Iterable[Case]) -> int:
    """Run all cases into `out`."""
    out.mkdir(parents=True)
    by_model: dict[bool, list[Case]] = {True: [], False: []}
    for item in cases:
        by_model[item.arguments[0] == EMBEDDED].append(item)
    failed = 0

    def run(item: Case) -> tuple[Case, float, str | None]:
        start = time.monotonic()
        problem = searches.run(item.arguments, out, item.name)
        return item, time.monotonic() - start, problem

    with ThreadPoolExecutor(searches.jobs) as pool:
        for embedded, group in by_model.items():
            if group and not embedded:
                make_carried(searches.src, out)
            for item, seconds, problem in pool.map(run, group):
                failed += problem is not None
                print(f"{item.name}: {problem or 'recorded'} ({seconds:.0f} s)", flush=True)
    recorded = [item for group in by_model.values() for item in group]
    (out / MANIFEST).write_text(json.dumps([asdict(item) for item in recorded], indent=1) + "\n", "utf-8")
    print(f"{len(recorded) - failed} of {len(recorded)} recorded")
    return 1 if failed else 0


def make_carried(src: Path, out: Path) -> None:
    """The folders of models with a scaling of 512 tokens: one searched; one that wins as a seed, with factors out of
    order, so that a search has to mend it and evaluates it as it is, too."""
    missing = [name for name in (CARRIED_CASE, UNORDERED_CASE) if not (out / name / SCALING).is_file()]
    if missing:
        sys.exit(f"expected the cases {CARRIED_CASE} and {UNORDERED_CASE} to be recorded too; choose them by --only")
    shutil.copytree(src / EMBEDDED_FOLDER, out / CARRIED)
    shutil.copy(out / CARRIED_CASE / SCALING, out / CARRIED / SCALING)
    shutil.copytree(out / CARRIED, out / UNORDERED)
    scaling = json.loads((out / UNORDERED_CASE / SCALING).read_text("utf-8"))
    window = scaling["windows"][-1]
    factors = window["factors"]
    at = next(index for index in range(1, len(factors)) if factors[index - 1] < factors[index])
    factors[at - 1], factors[at] = factors[at], factors[at - 1]
    window["max_length"] = 512
    (out / UNORDERED / SCALING).write_text(json.dumps(scaling, indent=1) + "\n", "utf-8")


Check = tuple[Case, str, Callable[[Searches, Case, Path, Path], list[str]]]
"""A case, the name of a check, and what finds the differences: with which code, from where, and into which folder."""


def compare(searches: Searches, recorded: Path, work: Path, pattern: str) -> int:
    """Print a line for each case and check, and how many are identical. 0 where all are."""
    cases = [Case(**row) for row in json.loads((recorded / MANIFEST).read_text("utf-8"))]
    checks: list[Check] = []
    for item in cases:
        if fnmatch(item.name, pattern):
            checks += [(item, "run anew", run_anew), (item, "resumed from half", resumed_from_half)]
            checks += [(item, "killed and resumed", killed_and_resumed)] if item.killed else []
    folders = {name: work / name.replace(" ", "-") for _, name, _ in checks}
    for folder in folders.values():
        folder.mkdir(parents=True)
        for model in (CARRIED, UNORDERED):
            (folder / model).symlink_to(recorded.resolve() / model)

    def run(check: Check) -> tuple[str, list[str]]:
        item, name, function = check
        return f"{item.name}, {name}", function(searches, item, recorded, folders[name])

    identical = 0
    with ThreadPoolExecutor(searches.jobs) as pool:
        for title, differences in pool.map(run, checks):
            identical += not differences
            print(f"{title}: {'; '.join(differences) or 'identical'}", flush=True)
    print(f"{identical} of {len(checks)} identical")
    return 0 if checks and identical == len(checks) else 1


def run_anew(searches: Searches, item: Case, recorded: Path, folder: Path) -> list[str]:
    """The differences when the search is run again."""
    problem = searches.run(item.arguments, folder, item.name)
    return [problem] if problem else differences(recorded / item.name, folder / item.name, resumed=False)


def resumed_from_half(searches: Searches, item: Case, recorded: Path, folder: Path) -> list[str]:
    """The differences when the recorded log goes on from its middle."""
    lines = (recorded / item.name / LOG).read_bytes().splitlines(keepends=True)
    (folder / item.name).mkdir()
    (folder / item.name / LOG).write_bytes(b"".join(lines[: 1 + (len(lines) - 1) // 2]))
    problem = searches.run(item.arguments, folder, item.name, resume=True)
    return [problem] if problem else differences(recorded / item.name, folder / item.name, resumed=True)


def killed_and_resumed(searches: Searches, item: Case, recorded: Path, folder: Path) -> list[str]:
    """The differences when a new search is killed on its way and resumed."""
    lines = (recorded / item.name / LOG).read_bytes().splitlines(keepends=True)
    log, left = folder / item.name / LOG, lines
    for _ in range(KILL_ATTEMPTS):
        shutil.rmtree(folder / item.name, ignore_errors=True)
        problem = searches.run(item.arguments, folder, item.name, kill_at=1 + (len(lines) - 1) // 3)
        if problem not in (None, KILLED):
            return [problem]
        left = log.read_bytes().splitlines(keepends=True)
        if problem == KILLED and len(left) < len(lines):
            break
    else:
        return [f"the search ended {KILL_ATTEMPTS} times before it could be killed"]
    if without_checksums(left)[1:] != without_checksums(lines)[1 : len(left)]:
        return ["the log of the killed search is not the beginning of the recorded one"]
    problem = searches.run(item.arguments, folder, item.name, resume=True)
    if problem:
        return [problem]
    # The header is the killed run's own, and must have stayed.
    kept = [] if log.read_bytes().startswith(b"".join(left)) else ["what was logged before the kill has changed"]
    return kept + differences(recorded / item.name, folder / item.name, resumed=False)


def differences(before: Path, after: Path, *, resumed: bool) -> list[str]:
    """The differences between two folders of a search, in words. `resumed`: from the very log that is in `before`."""
    found = []
    old, new = (without_checksums((folder / LOG).read_bytes().split(b"\n")) for folder in (before, after))
    if resumed:
        found += [] if old[0] == new[0] else ["the header of the log was rewritten"]
    else:
        found += different_keys("header", *(json_texts(line.decode(), {"record"}) for line in (old[0], new[0])))
    if old[1:] != new[1:]:
        first = next((at for at, pair in enumerate(zip(old, new, strict=False)) if at and pair[0] != pair[1]), None)
        where = f"from line {first + 1} on" if first else "one is the beginning of the other"
        found.append(f"the log ({len(old) - 1} and {len(new) - 1} lines) {where}")
    for name in (SCALING, SUMMARY):
        old_text, new_text = ((folder / name).read_text("utf-8") for folder in (before, after))
        found += different_keys(name, *(json_texts(text, CIRCUMSTANCES) for text in (old_text, new_text)))
    files = [sorted(path.name for path in folder.iterdir()) for folder in (before, after)]
    return found + ([] if files[0] == files[1] else [f"files ({', '.join(files[0])}; now {', '.join(files[1])})"])


def without_checksums(lines: list[bytes]) -> list[bytes]:
    return [CHECKSUM.sub(b"}", line) for line in lines]


def json_texts(text: str, left_out: set[str]) -> dict[str, str]:
    """The keys of a JSON object, in order, and their values as text; `provenance` without what is left out either."""
    value = json.loads(text, parse_float=lambda number: {"float": number})  # every digit counts
    kept = {key: part for key, part in value.items() if key not in left_out}
    if "provenance" in kept:
        kept["provenance"] = {key: part for key, part in kept["provenance"].items() if key not in left_out}
    return {key: json.dumps(part) for key, part in kept.items()}


def different_keys(name: str, old: dict[str, str], new: dict[str, str]) -> list[str]:
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if keys:
        return [f"{name}: {', '.join(keys)}"]
    return [] if list(old) == list(new) else [f"{name}: the order of its keys"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--src", type=Path, required=True, help="the folder that has the package longrope")
    shared.add_argument("--python", type=Path, required=True, help="the Python with all that it depends on")
    shared.add_argument("--jobs", type=int, default=2, help="searches at a time, one core each (default: 2)")
    shared.add_argument("--only", default="*", help="cases by name, with * and ? (default: all)")
    recording = commands.add_parser("record", parents=[shared], help="run the searches and keep them")
    recording.add_argument("--out", type=Path, required=True, help="a new folder")
    comparing = commands.add_parser("compare", parents=[shared], help="run them again and compare")
    comparing.add_argument("--recorded", type=Path, required=True, help="the folder that record made")
    comparing.add_argument("--work", type=Path, help="a new folder that keeps the new runs (default: they are dropped)")
    commands.add_parser("serve", help="used by the other two: fork a search for each line on standard input")
    arguments = parser.parse_args()
    if arguments.command == "serve":
        serve()
        return 0
    # Not resolved: the Python of a virtual environment is a link, and is one only by its place.
    with Searches(arguments.src.absolute(), arguments.python.absolute(), arguments.jobs) as searches:
        if arguments.command == "record":
            cases = [item for item in CASES if fnmatch(item.name, arguments.only)]
            return record(searches, arguments.out.absolute(), cases)
        recorded = arguments.recorded.absolute()
        if arguments.work is not None:
            return compare(searches, recorded, arguments.work.absolute(), arguments.only)
        with tempfile.TemporaryDirectory(prefix="compare-searches-") as work:
            return compare(searches, recorded, Path(work), arguments.only)


if __name__ == "__main__":
    sys.exit(main())
