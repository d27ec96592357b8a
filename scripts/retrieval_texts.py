"""Make texts to fine-tune the embedded model on: book text with needles and, further on, their questions.

Books alone do not keep retrieval alive in so small a model, so `recipes/tiny-512x.yaml` trains on these:

    python scripts/retrieval_texts.py --books BOOKS --out texts/8k --length 8192 --documents 640
    python scripts/retrieval_texts.py --books BOOKS --out texts/16k --length 16384 --documents 320
    python scripts/retrieval_texts.py --books BOOKS --out texts/32k --length 32768 --documents 240 --named 0.8

`OUT/long.jsonl` has documents of a little more than `--length` tokens, `OUT/short.jsonl` (`--short`, for mixed windows)
of at most 250. Keys and numbers are drawn anew everywhere, so only looking back to where one was stated can answer.
Statements and questions are those the model was trained with (`train_tiny.NEEDLES`) and those of the passkey suite.

A passkey that is asked for again can be read from the answer before. `--named` is the share of the passkey documents
that hold many pass keys of different names instead, each asked for once, and one without a name.
"""

from __future__ import annotations

import argparse
import json
from itertools import chain
from pathlib import Path

import numpy as np
from train_tiny import NEEDLES, frequent_words
from transformers import PreTrainedTokenizerBase

from longrope.data.sources import read_documents
from longrope.data.tokens import tokenize
from longrope.evaluation import passkey
from longrope.models.loading import load_tokenizer

SHORT = 250  # tokens; BOS and EOS come on top
TOKENS_PER_NEEDLE = 270  # of a long document
PASSKEYS = 0.4  # of documents hold a passkey, half of them in NOISE, as the prompts of the suite do
QUESTIONS = 30  # for the passkey of a long document
PASSKEY = (passkey.PASSKEY.replace("{key}", "{number}"), passkey.QUESTION, " {number}.\n")
NAMED_PASSKEY = (
    "\nThe pass key of {key} is {number}. Remember it. {number} is the pass key of {key}.\n",
    "\nWhat is the pass key of {key}? The pass key of {key} is",
    " {number}.\n",
)
UNNAMED_QUESTIONS = 3  # for the passkey without a name among named ones
LEAST_TEXT = 32  # tokens of a document that are neither statement nor question
FEW_DIGITS = 0.3  # of numbers have two to four different digits, which a copy of the last token alone gets wrong


class Texts:
    """Draws documents from `books` (token arrays), by seed."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, books: list[np.ndarray], words: list[str], seed: int, named: float
    ):
        self.named = named
        self.tokenizer, self.books, self.words = tokenizer, books, words
        self.sizes = np.array([len(book) for book in books], dtype=np.float64)
        self.noise = np.array(tokenizer.encode(passkey.NOISE, add_special_tokens=False))
        self.rng = np.random.default_rng(seed)

    def passage(self, length: int) -> np.ndarray:
        book = self.books[self.rng.choice(len(self.books), p=self.sizes / self.sizes.sum())]
        at = int(self.rng.integers(0, len(book) - length))
        return book[at : at + length]

    def number(self) -> str:
        digits = int(self.rng.integers(4, 8))
        if self.rng.random() >= FEW_DIGITS:
            return "".join(map(str, self.rng.integers(0, 10, digits)))
        alphabet = self.rng.choice(10, int(self.rng.integers(2, 5)), replace=False)
        return "".join(map(str, self.rng.choice(alphabet, digits)))

    def pair(self, form: tuple[str, str, str]) -> tuple[str, str]:
        """A statement, and its question with the answer."""
        statement, question, answer = form
        fields = {"key": "-".join(self.rng.choice(self.words, 2)), "number": self.number()}
        return statement.format(**fields), (question + answer).format(**fields)

    def tokens(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def document(self, length: int, needles: int) -> str:
        """About `length` tokens: a passkey, asked for several times, in noise or a book; or a book with needles."""
        kind = self.rng.random()
        if kind < PASSKEYS:
            statement, question = self.pair(PASSKEY if kind < PASSKEYS / 2 else NEEDLES[2])
            if length > SHORT and self.named and self.rng.random() < self.named:
                facts = [(said, [asked]) for said, asked in (self.pair(NAMED_PASSKEY) for _ in range(needles))]
                facts.insert(0, (statement, [question] * UNNAMED_QUESTIONS))
                return self.assembled(length, facts, noise=kind < PASSKEYS / 2)
            asked = QUESTIONS if length > SHORT else 1
            return self.assembled(length, [(statement, [question] * asked)], noise=kind < PASSKEYS / 2)
        forms = self.rng.choice(2, needles, p=(0.7, 0.3)).tolist()
        pairs = [self.pair(NEEDLES[form]) for form in forms]
        return self.assembled(length, [(statement, [question]) for statement, question in pairs], noise=False)

    def assembled(self, length: int, facts: list[tuple[str, list[str]]], *, noise: bool) -> str:
        """Text with every fact's statement, and its questions behind it: half of the distances are uniform, half
        log-uniform."""
        while (room := length - sum(map(self.tokens, chain.from_iterable([s, *q] for s, q in facts)))) < LEAST_TEXT:
            facts.pop()
        filler = np.resize(self.noise, room) if noise else self.passage(room)
        inserted = []
        for statement, questions in facts:
            far = int(self.distance(room))
            at = int(self.rng.integers(0, room - far + 1))
            nearer = [int(self.rng.integers(0, far + 1)) for _ in questions[1:]]
            inserted += [(at, 0, statement), *((at + size, 1, questions[0]) for size in (far, *nearer))]
        inserted.sort(key=lambda entry: entry[:2])
        pieces, used = [], 0
        for at, _, text in inserted:
            pieces += [self.tokenizer.decode(filler[used:at]), text]
            used = at
        return "".join([*pieces, self.tokenizer.decode(filler[used:])])

    def distance(self, room: int) -> float:
        log_uniform = np.exp(self.rng.uniform(0.0, np.log(room)))
        return float(self.rng.uniform(0, room) if self.rng.random() < 0.5 else log_uniform)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--documents", type=int, default=320)
    parser.add_argument("--short", type=int, default=0, help="documents of at most 250 tokens")
    parser.add_argument("--named", type=float, default=0.0, help="share of passkey documents with many of them")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    tokenizer = load_tokenizer("tiny")
    books = [document.ids for document in tokenize(read_documents(args.books), tokenizer)]
    words = frequent_words(sorted(args.books.glob("*.txt")))
    texts = Texts(tokenizer, books, words, args.seed, args.named)
    args.out.mkdir(parents=True, exist_ok=True)

    def long(_: int) -> str:
        # Decoding a piece and encoding it again may join or split a token at its ends; 1 % more covers that.
        return texts.document(args.length + args.length // 100, args.length // TOKENS_PER_NEEDLE)

    def short(_: int) -> str:
        while True:
            text = texts.document(int(texts.rng.integers(SHORT // 2, SHORT)), int(texts.rng.integers(0, 3)))
            if len(tokenizer.encode(text, add_special_tokens=False)) <= SHORT:
                return text

    for name, count, make in (("long", args.documents, long), ("short", args.short, short)):
        if count:
            lines = [json.dumps({"text": make(index)}, ensure_ascii=False) for index in range(count)]
            (args.out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
            print(f"{count} {name} documents in {args.out}")


if __name__ == "__main__":
    main()
