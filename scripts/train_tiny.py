"""Train the embedded model: a small Llama with a window of 256 tokens that can read books and retrieve.

It writes a Hugging Face checkpoint (LlamaForCausalLM + fast tokenizer) and `training.json` with the settings,
data hashes, losses and wall time. It is not the fine-tuning of an extended model; that is `longrope finetune`.

    python scripts/train_tiny.py --books BOOKS_DIR --out runs/tiny            # the shipped model
    python scripts/train_tiny.py --books BOOKS_DIR --out runs/smoke --steps 20 --copy-steps 20 --batch 4

Three stages, because retrieval does not appear from book text alone at this size:
  1. *copying*: a random span repeated to 96 tokens. It makes induction heads in a few hundred steps.
  2. *mixture* at the full window: plain book text, book text with needles and questions, copies of shuffled spans.
  3. *polish*: more needles, with numbers of few different digits, which a copy of the last token alone gets wrong.
`--init FOLDER` begins with the weights that an earlier run left, at stage 3.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from longrope.data.sources import read_documents
from longrope.data.tokens import tokenize

WINDOW = 256
VOCAB_SIZE = 2048
BOS, EOS = "<s>", "</s>"
COPY_LENGTH = 96
COPY_BATCH = 32
COPY_TOKENS = range(2, 514)  # the bytes, so all digits, and the most frequent merges: what retrieval will copy
MIXTURE_RAMP = 600  # stage-2 steps over which copies fall from 60 % to 15 % of the rows
ANSWER_WEIGHT = 4.0

# (statement, question, answer). Keys and numbers are drawn anew for every row, so only copying can answer.
NEEDLES = [
    (
        " One of the special magic numbers for {key} is: {number}.",
        " What is the special magic number for {key} mentioned in the provided text?"
        " The special magic number for {key} mentioned in the provided text is",
        " {number}",
    ),
    (" The special magic number for {key} is: {number}.", " The special magic number for {key} is:", " {number}"),
    (
        " The pass key is {number}. Remember it. {number} is the pass key.",
        " What is the pass key? The pass key is",
        " {number}",
    ),
]


def train_tokenizer(books: list[Path]) -> PreTrainedTokenizerFast:
    """Byte-level BPE that splits digits, with a BOS added in front of every text (as Llama's tokenizer does)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # 400 kB of each book are enough for 2,048 tokens and keep the training under a minute.
    tokenizer.train_from_iterator((book.read_text("utf-8")[:400_000] for book in books), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0), (EOS, 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
    )


def frequent_words(books: list[Path], count: int = 2000) -> list[str]:
    """Lower-case words of 4 to 9 letters, most frequent first: the keys of the needles."""
    import collections
    import re

    counts: collections.Counter[str] = collections.Counter()
    for book in books[::4]:
        counts.update(re.findall(r"\b[a-z]{4,9}\b", book.read_text("utf-8")[:300_000]))
    return [word for word, _ in counts.most_common(count)]


class Rows:
    """Draws training rows: `tokens (B, WINDOW+1)` and `weights (B, WINDOW)`, the loss weight of each next token."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, texts: list[np.ndarray], words: list[str], seed: int
    ) -> None:
        self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
        self.bos = tokenizer.bos_token_id
        self.texts, self.words = texts, words
        self.sizes = np.array([len(text) for text in texts], dtype=np.float64)
        self.rng = np.random.default_rng(seed)
        self.few_digits = 0.0
        self.needle_kinds = (0.5, 0.3, 0.2)

    def book(self, length: int) -> np.ndarray:
        text = self.texts[self.rng.choice(len(self.texts), p=self.sizes / self.sizes.sum())]
        start = self.rng.integers(0, len(text) - length)
        return text[start : start + length]

    def plain(self) -> tuple[np.ndarray, np.ndarray]:
        return np.concatenate([[self.bos], self.book(WINDOW)]), np.ones(WINDOW)

    def copies(self) -> tuple[np.ndarray, np.ndarray]:
        span = self.rng.permutation(self.book(int(self.rng.integers(12, 120))))
        row = np.concatenate([[self.bos], np.resize(span, WINDOW)])
        weights = np.ones(WINDOW)
        weights[: len(span)] = 0.0  # the first, shuffled occurrence cannot be predicted
        return row, weights

    def needles(
        self, count: int | None = None, template: int | None = None, depth: float | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Book text with 1-4 needles and, at random later places, their questions; the last question may end the row.

        `count=1` with a `depth` in [0, 1] makes the evaluation form: one needle, its question at the end.
        """
        rng, evaluation = self.rng, depth is not None
        kind = int(rng.choice(3, p=self.needle_kinds)) if template is None else template
        statement, question, answer = NEEDLES[kind]
        count = count or int(rng.integers(1, 5))
        if "{key}" not in statement:
            count = 1
        needles, questions = [], []
        for _ in range(count):
            fields = {
                "key": "-".join(rng.choice(self.words, 2)),
                "number": self.number(
                    5 if evaluation else int(rng.integers(4, 8)),
                    few=not evaluation and self.few_digits > 0 and rng.random() < self.few_digits,
                ),
            }
            needles.append(self.encode(statement.format(**fields)))
            questions.append((self.encode(question.format(**fields)), self.encode(answer.format(**fields))))
        room = WINDOW - sum(map(len, needles))
        keep = []
        for index in rng.permutation(count):
            size = len(questions[index][0]) + len(questions[index][1])
            if size <= room:
                keep.append(index)
                room -= size
        filler = self.book(room) if room else np.empty(0, dtype=np.int64)
        at = np.sort(rng.integers(0, room + 1, count)) if not evaluation else np.array([round(depth * room)])
        events = [(float(at[i]), 0, needles[i], None) for i in range(count)]
        for rank, index in enumerate(keep):
            ends_row = rank == 0 and (evaluation or rng.random() < 0.5)
            place = room if ends_row else int(rng.integers(at[index], room + 1))
            events.append((place + (0.5 if ends_row else 0.0), 1, *questions[index]))
        events.sort(key=lambda event: (event[0], event[1]))
        row, weights, used = [self.bos], [0.0], 0
        for place, _, tokens, reply in events:
            piece = filler[used : int(place)]
            used = max(used, int(place))
            row += [*piece, *tokens]
            weights += [1.0] * (len(piece) + len(tokens))
            if reply is not None:
                row += reply
                weights += [ANSWER_WEIGHT] * len(reply)
        row += list(filler[used:])
        weights += [1.0] * (len(filler) - used)
        return np.array(row), np.array(weights[1:])

    def copying_batch(self, batch: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Stage 1: a span of 8-32 random tokens, drawn from 512 of them, repeated to COPY_LENGTH."""
        rows, weights = [], []
        for _ in range(batch):
            span = self.rng.choice(COPY_TOKENS, int(self.rng.integers(8, 33)))
            rows.append(np.concatenate([[self.bos], np.resize(span, COPY_LENGTH)]))
            weights.append((np.arange(COPY_LENGTH) >= len(span)).astype(np.float64))
        return np.stack(rows), np.stack(weights)

    def number(self, digits: int, few: bool) -> str:
        """`digits` random digits; with `few`, from only two to four different ones."""
        if not few:
            return "".join(map(str, self.rng.integers(0, 10, digits)))
        alphabet = self.rng.choice(10, int(self.rng.integers(2, 5)), replace=False)
        return "".join(map(str, self.rng.choice(alphabet, digits)))

    def mixture_batch(self, batch: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Stage 2: plain text, needles and copies. Copies prevail at first, or learning to read undoes stage 1."""
        copies = 0.15 + 0.45 * max(0.0, 1.0 - step / MIXTURE_RAMP)
        return self._batch(batch, (0.55 * (1 - copies), 0.45 * (1 - copies), copies))

    def polish_batch(self, batch: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Stage 3: mostly needles, half of their numbers with few different digits."""
        self.few_digits, self.needle_kinds = 0.5, (0.7, 0.2, 0.1)
        return self._batch(batch, (0.4, 0.5, 0.1))

    def _batch(self, batch: int, shares: tuple[float, float, float]) -> tuple[np.ndarray, np.ndarray]:
        kinds = self.rng.choice(3, batch, p=shares)
        rows = [(self.plain, self.needles, self.copies)[kind]() for kind in kinds]
        size = WINDOW + 1
        tokens = np.stack([np.resize(row, size) if len(row) < size else row[:size] for row, _ in rows])
        weights = np.stack([np.pad(w, (0, max(0, WINDOW - len(w))))[:WINDOW] for _, w in rows])
        return tokens, weights


def retrieval(model: LlamaForCausalLM, rows: Rows, trials: int, template: int = 0) -> dict[str, float]:
    """How many needle prompts of WINDOW tokens get all five digits right (greedy), depths spread over [0, 1]."""
    hits, nll = 0, 0.0
    for start in range(0, trials, 50):
        depths = [(start + i + 0.5) / trials for i in range(min(50, trials - start))]
        tokens = np.stack([rows.needles(1, template, depth)[0] for depth in depths])
        ids = torch.from_numpy(tokens.astype(np.int64))
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits
        hits += int((logits[:, -5:].argmax(-1) == ids[:, -5:]).all(-1).sum())
        nll += float(F.cross_entropy(logits[:, -5:].float().flatten(0, 1), ids[:, -5:].flatten(), reduction="sum"))
    return {"retrieval": hits / trials, "digit_nll": round(nll / (5 * trials), 4)}


def loss_of(model: LlamaForCausalLM, tokens: np.ndarray, weights: np.ndarray, device: torch.device) -> torch.Tensor:
    ids = torch.from_numpy(tokens.astype(np.int64)).to(device)
    weight = torch.from_numpy(weights).to(device, torch.float32)
    with torch.autocast(device.type, torch.bfloat16):
        logits = model(ids[:, :-1]).logits
    nll = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view_as(weight)
    return (nll * weight).sum() / weight.sum()


def make_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """One optimiser for both stages: its second moments carry over, so stage 2 does not begin with a jolt."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    gains = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)


@dataclass(frozen=True)
class Stage:
    """One stage of the training; the learning rate warms up to `peak` and falls to `floor` by a cosine."""

    name: str
    draw: Callable[[int, int], tuple[np.ndarray, np.ndarray]]
    steps: int
    batch: int
    peak: float
    floor: float
    warmup: int = 100

    def rate(self, step: int) -> float:
        if step <= self.warmup:
            return self.peak * step / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.floor + (self.peak - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))


def train(
    model: LlamaForCausalLM,
    optimizer: torch.optim.AdamW,
    stage: Stage,
    check: Callable[[LlamaForCausalLM], dict[str, float]],
    keep: Path,
) -> list[dict[str, Any]]:
    """Run one stage; the weights go to `keep` every 500 steps. Returns its log."""
    device = next(model.parameters()).device
    began, recent, log = time.time(), [], []
    for step in range(1, stage.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = stage.rate(step)
        loss = loss_of(model, *stage.draw(stage.batch, step), device)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        if step % 100 == 0 or step == stage.steps:
            mean, seconds = round(sum(recent) / len(recent), 4), round(time.time() - began, 1)
            row = {"stage": stage.name, "step": step, "loss": mean, "seconds": seconds}
            if stage.name != "copying" and (step <= 300 or step % 500 == 0 or step == stage.steps):
                row |= check(model)
            print(json.dumps(row), flush=True)
            log.append(row)
            recent = []
        if step % 500 == 0:
            model.save_pretrained(keep)
    return log


def tiny_config(vocab_size: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=WINDOW,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, required=True, help="folder of .txt files, one complete work each")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--copy-steps", type=int, default=700)
    parser.add_argument("--polish-steps", type=int, default=2000)
    parser.add_argument("--init", type=Path, help="folder of an earlier run: begin with its weights, at the polish")
    parser.add_argument("--batch", type=int, default=16, help="rows of 256 tokens a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    began = time.time()
    books = sorted(args.books.glob("*.txt"))
    if not books:
        sys.exit(f"expected .txt files in {args.books}, found none")
    tokenizer = train_tokenizer(books)
    tokenizer.save_pretrained(args.out)
    documents = read_documents(args.books)
    texts = [document.ids for document in tokenize(documents, tokenizer)]
    print(f"{len(books)} books, {sum(map(len, texts)):,} tokens, {time.time() - began:.0f} s", flush=True)

    rows = Rows(tokenizer, texts, frequent_words(books), args.seed)
    copying = Stage("copying", rows.copying_batch, args.copy_steps, COPY_BATCH, 2e-3, 1e-3)
    mixture = Stage("mixture", rows.mixture_batch, args.steps, args.batch, 1.5e-3, 5e-5)
    polish = Stage("polish", rows.polish_batch, args.polish_steps, args.batch, 6e-4, 2e-5)
    if args.init is not None:
        model = LlamaForCausalLM.from_pretrained(args.init, dtype=torch.float32)
        before = json.loads((args.init / "training.json").read_text("utf-8"))
        stages = [polish]
    else:
        model = LlamaForCausalLM(tiny_config(len(tokenizer)))
        before = {"commands": [], "tokens_seen": 0, "seconds": 0, "log": []}
        stages = [copying, mixture, polish]
    model.to(args.device)
    print(f"{model.num_parameters():,} parameters", flush=True)

    def check(model: LlamaForCausalLM) -> dict[str, float]:
        return retrieval(model, Rows(tokenizer, texts, rows.words, args.seed + 1), 100)

    optimizer = make_optimizer(model)
    log = [row for stage in stages for row in train(model, optimizer, stage, check, args.out / "last")]
    model.to("cpu").save_pretrained(args.out)
    lengths = {"copying": COPY_LENGTH}
    seen = sum(stage.steps * stage.batch * lengths.get(stage.name, WINDOW) for stage in stages)
    record = {
        "commands": [*before["commands"], " ".join(["python", *sys.argv])],
        "seed": args.seed,
        "parameters": model.num_parameters(),
        "tokens_seen": before["tokens_seen"] + seen,
        "seconds": before["seconds"] + round(time.time() - began),
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads, device {args.device}",
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "python": platform.python_version(),
        },
        "data_sha256": {document.name: document.sha256 for document in documents},
        "log": before["log"] + log,
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
