"""Make texts to fine-tune the embedded model on: book text with needles and, further on, their questions.

Books alone do not keep retrieval alive in so small a model, so `recipes/tiny-512x.yaml` trains on these:

    python scripts/retrieval_texts.py --books BOOKS --out texts/2k --length 2048 --documents 2400
    python scripts/retrieval_texts.py --books BOOKS --out texts/4k --length 4096 --documents 1600 --seed 1

`OUT/long.jsonl` has documents that fill a row of `--length` tokens with BOS and EOS (or have up to `EXCESS` more),
`OUT/short.jsonl` (`--short`, for mixed windows) of at most 250. Keys and numbers are drawn anew everywhere, so only
looking back to where one was stated can answer. Statements and questions are those the model was trained with
(`train_tiny.NEEDLES`) and those of the passkey suite. A passkey that is asked for again can be read from the answer
before, so it is asked for four times at most; and facts are often stated first of all, or asked for from afar.
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
SPECIAL_TOKENS = 2  # BOS and EOS
EXCESS = 8  # tokens that a long document may have above its row
KINDS = (0.35, 0.3, 0.15, 0.2)  # of documents: needles with keys, a passkey in the suite's noise, one in a book, a book
TOKENS_PER_NEEDLE = 270  # of a long document with the most needles
MOST_NEEDLES = 0.2  # of documents with needles have the most; the others fewer, log-uniformly
QUESTIONS = 4  # at most, for the passkey of a long document
INSTRUCTED = 0.7  # of documents in noise begin with the suite's instruction
FAR = 0.4  # of statements are asked for from more than half of the document away, at random beside the other distances
FIRST = 0.15  # of statements are the first sentence
PASSKEY = (passkey.PASSKEY.replace("{key}", "{number}"), passkey.QUESTION, " {number}.")
DIGITS = {4: 0.1, 5: 0.3, 6: 0.2, 7: 0.4}  # of numbers, by how many digits they have; the suites' have 5 and 7
FEW_DIGITS = 0.3  # of numbers have two to four different digits, which a copy of the last token alone gets wrong
LEAST_TEXT = 32  # tokens of a document that are neither statement nor question


class Texts:
    """Draws documents from `books` (token arrays), by seed."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, books: list[np.ndarray], words: list[str], seed: int):
        self.tokenizer, self.books, self.words = tokenizer, books, words
        self.sizes = np.array([len(book) for book in books], dtype=np.float64)
        self.noise = np.array(tokenizer.encode(passkey.NOISE, add_special_tokens=False))
        self.rng = np.random.default_rng(seed)

    def passage(self, length: int) -> np.ndarray:
        book = self.books[self.rng.choice(len(self.books), p=self.sizes / self.sizes.sum())]
        at = int(self.rng.integers(0, len(book) - length))
        return book[at : at + length]

    def number(self) -> str:
        digits = int(self.rng.choice(list(DIGITS), p=list(DIGITS.values())))
        if self.rng.random() >= FEW_DIGITS:
            return "".join(map(str, self.rng.integers(0, 10, digits)))
        alphabet = self.rng.choice(10, int(self.rng.integers(2, 5)), replace=False)
        return "".join(map(str, self.rng.choice(alphabet, digits)))

    def fact(self, form: tuple[str, str, str], questions: int) -> tuple[str, list[str]]:
        """A statement, and its question with the answer as often as it is asked."""
        statement, question, answer = form
        fields = {"key": "-".join(self.rng.choice(self.words, 2)), "number": self.number()}
        return statement.format(**fields), [(question + answer).format(**fields)] * questions

    def tokens(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def document(self, length: int) -> str:
        """About `length` tokens of one of the `KINDS`."""
        kind = int(self.rng.choice(len(KINDS), p=KINDS))
        asked = int(self.rng.integers(1, QUESTIONS + 1)) if length > SHORT else 1
        if kind == 1:
            instruction = passkey.INSTRUCTION if self.rng.random() < INSTRUCTED and length > SHORT else ""
            return self.assembled(length, [self.fact(PASSKEY, asked)], noise=True, begin=instruction)
        if kind == 2:
            return self.assembled(length, [self.fact(NEEDLES[2], asked)], noise=False)
        if kind == 3:
            return self.assembled(length, [], noise=False)
        most = max(1, length // TOKENS_PER_NEEDLE)
        fewer = int(np.exp(self.rng.uniform(0.0, np.log(most + 1))))
        needles = most if self.rng.random() < MOST_NEEDLES else fewer
        forms = self.rng.choice(2, needles, p=(0.7, 0.3)).tolist()
        return self.assembled(length, [self.fact(NEEDLES[form], 1) for form in forms], noise=False)

    def assembled(self, length: int, facts: list[tuple[str, list[str]]], *, noise: bool, begin: str = "") -> str:
        """Text with every fact's statement, and its questions behind it."""
        while (room := length - sum(map(self.tokens, chain([begin], *([s, *q] for s, q in facts))))) < LEAST_TEXT:
            facts.pop()
        filler = np.resize(self.noise, room) if noise else self.passage(room)
        inserted = []
        for statement, questions in facts:
            far = int(self.distance(room))
            at = int(self.rng.integers(0, room - far + 1))
            if noise:  # between two repetitions, as in the suite
                at -= at % len(self.noise)
            if self.rng.random() < FIRST:
                at = 0
            nearer = [int(self.rng.integers(far // 2, far + 1)) for _ in questions[1:]]
            places = [(at + size, 1) for size in (far, *nearer)]
            inserted += [(at, 0, statement), *((*place, text) for place, text in zip(places, questions, strict=True))]
        inserted.sort(key=lambda entry: entry[:2])
        pieces, used = [begin], 0
        for at, _, text in inserted:
            pieces += [self.tokenizer.decode(filler[used:at]), text]
            used = at
        return "".join([*pieces, self.tokenizer.decode(filler[used:])])

    def distance(self, room: int) -> float:
        """From a statement to its first question: half uniform, half log-uniform, or `FAR`."""
        log_uniform = np.exp(self.rng.uniform(0.0, np.log(room)))
        near = float(self.rng.uniform(0, room) if self.rng.random() < 0.5 else log_uniform)
        return float(self.rng.uniform(0.5, 1.0) * room) if self.rng.random() < FAR else near

    def row(self, length: int) -> str:
        """A document of `length` to `length + EXCESS` tokens: pieces decoded and encoded again may join or split."""
        asked = length
        while True:
            text = self.document(asked)
            spare = self.tokens(text) - length
            if 0 <= spare <= EXCESS:
                return text
            asked = max(length // 2, asked - int(np.sign(spare)) * int(self.rng.integers(1, abs(spare) + 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--documents", type=int, default=320)
    parser.add_argument("--short", type=int, default=0, help="documents of at most 250 tokens")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    tokenizer = load_tokenizer("tiny")
    books = [document.ids for document in tokenize(read_documents(args.books), tokenizer)]
    words = frequent_words(sorted(args.books.glob("*.txt")))
    texts = Texts(tokenizer, books, words, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    def long(_: int) -> str:
        return texts.row(args.length - SPECIAL_TOKENS)

    def short(_: int) -> str:
        while True:
            text = texts.document(int(texts.rng.integers(SHORT // 2, SHORT)))
            if texts.tokens(text) <= SHORT:
                return text

    for name, count, make in (("long", args.documents, long), ("short", args.short, short)):
        if count:
            lines = [json.dumps({"text": make(index)}, ensure_ascii=False) for index in range(count)]
            (args.out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
            print(f"{count} {name} documents in {args.out}")


if __name__ == "__main__":
    main()
