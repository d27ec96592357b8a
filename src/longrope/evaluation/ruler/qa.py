"""RULER's question answering: one SQuAD question, its paragraph among others (scripts/data/synthetic/qa.py)."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrope.errors import LongRopeError
from longrope.evaluation.ruler.samples import Sample
from longrope.storage import sha256_bytes

PROMPT = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "The following are given documents.\n\n{context}\n\nAnswer the question based on the given documents. Only give me"
    " the answer and do not output any other words.\n\nQuestion: {query} Answer:"
)


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its accepted answers, its paragraph, and the other paragraphs of the same article (places in the
    file's list of paragraphs)."""

    text: str
    answers: tuple[str, ...]
    paragraph: int
    related: tuple[int, ...]


@dataclass(frozen=True)
class Questions:
    """A file in SQuAD's format (1.1 or 2.0): its different paragraphs, sorted, and its answerable questions."""

    name: str
    sha256: str
    paragraphs: tuple[str, ...]
    questions: tuple[Question, ...]

    @classmethod
    def read(cls, path: Path) -> Questions:
        """Raises LongRopeError, with the path, for a file that is not in SQuAD's format or has no question."""
        try:
            content = path.read_bytes()
            articles = json.loads(content)["data"]
            paragraphs = sorted({paragraph["context"] for article in articles for paragraph in article["paragraphs"]})
            place = {text: index for index, text in enumerate(paragraphs)}
            questions = [question for article in articles for question in _questions(article, place)]
        except OSError as error:
            raise LongRopeError(f"cannot read the questions {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise LongRopeError(
                f"{path} is not in SQuAD's format: expected JSON with data, paragraphs, context, qas, question, answers"
            ) from error
        if not questions:
            raise LongRopeError(f"{path} holds no answerable question")
        return cls(path.name, sha256_bytes(content), tuple(paragraphs), tuple(questions))

    def draw(self, count: int, rng: random.Random) -> list[Question]:
        """`count` different questions. Raises LongRopeError when there are fewer."""
        if count > len(self.questions):
            raise LongRopeError(f"expected {count} answerable questions in {self.name}, found {len(self.questions)}")
        return rng.sample(self.questions, count)

    def make(self, size: int, rng: random.Random, question: Question) -> Sample:
        """The question behind `size` paragraphs: its own, its article's others, then any; repeated where too few."""
        count = len(self.paragraphs)
        if size >= count:
            chosen = [index % count for index in range(size)]
        elif size - 1 <= len(question.related):
            chosen = [question.paragraph, *rng.sample(question.related, size - 1)]
        else:
            near = {question.paragraph, *question.related}
            far = [index for index in range(count) if index not in near]
            chosen = [question.paragraph, *question.related, *rng.sample(far, size - 1 - len(question.related))]
        rng.shuffle(chosen)
        documents = [f"Document {at}:\n{self.paragraphs[index]}" for at, index in enumerate(chosen, start=1)]
        return Sample(PROMPT.format(context="\n\n".join(documents), query=question.text), question.answers)


def _questions(article: dict[str, Any], place: dict[str, int]) -> list[Question]:
    own = sorted({place[paragraph["context"]] for paragraph in article["paragraphs"]})
    return [
        Question(
            entry["question"],
            tuple(str(answer["text"]) for answer in entry["answers"]),
            place[paragraph["context"]],
            tuple(index for index in own if index != place[paragraph["context"]]),
        )
        for paragraph in article["paragraphs"]
        for entry in paragraph["qas"]
        if not entry.get("is_impossible", False) and entry["answers"]
    ]
