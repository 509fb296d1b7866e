"""Samples as token ids and labels: `Plain` for captions, `Chat` for conversations.

Ids hold `IMAGE_TOKEN` K times for an image; labels are -100 wherever there is no loss.

`Plain` (stage 1): `[BOS][visual tokens]caption[EOS]`, loss on the caption and the EOS that ends it.
`Chat` (stage 2): the tokenizer's own chat template, loss on the answers alone. A template is a
program, so where an answer lies is found by running it: the text with the answer begins with the
text before it plus the generation prompt; what follows is the answer with its end-of-turn token.
The whole text is tokenized, as at inference, and a token is labelled where it begins inside.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from .conversation_files import MARK, Sample
from .projector import IMAGE_TOKEN

IGNORED = -100


class Encoded(NamedTuple):
    ids: list[int]
    labels: list[int]


class Plain:
    """`[BOS][visual tokens]caption[EOS]`."""

    name = "plain"

    def __init__(self, tokenizer: Any, visual_tokens: int, image_token: int = IMAGE_TOKEN) -> None:
        self.tokenizer, self.image = tokenizer, [image_token] * visual_tokens
        self.bos, self.eos = (_one(tokenizer, what) for what in ("bos", "eos"))
        self.ends = self.eos  # tokens that end what is generated

    def caption(self, sample: Sample) -> str:
        """The caption, or the last answer of a conversation."""
        if sample.caption is not None:
            return sample.caption.strip()
        answers = [text for role, text in sample.turns if role == "assistant"]
        return answers[-1].strip() if answers else ""

    def problem(self, sample: Sample) -> str | None:
        """Which fault keeps a sample from being used."""
        if not sample.images or sample.images == [""]:
            return "missing_images"
        return None if self.caption(sample) else "empty_captions"

    def longest(self, sample: Sample) -> int:
        """No encoding has more tokens: a token stands for a byte at least."""
        return len(sample.images) * len(self.image) + len(self.caption(sample).encode()) + 3

    def encode(self, sample: Sample) -> Encoded:
        before = self.prompt(len(sample.images))
        after = self.tokenizer(self.caption(sample), add_special_tokens=False)["input_ids"]
        after = after + self.eos
        return Encoded(before + after, [IGNORED] * len(before) + after)

    def prompt(self, images: int) -> list[int]:
        """What a caption is generated after."""
        return self.bos + self.image * images

    def question(self, sample: Sample) -> list[int]:
        """The prompt of a sample."""
        return self.prompt(len(sample.images))

    def expected(self, sample: Sample) -> str:
        """What should be generated after it."""
        return self.caption(sample)

    def answered(self, sample: Sample, text: str) -> Sample:
        """The sample with another caption."""
        return sample._replace(caption=text)


class Chat:
    """The tokenizer's chat template, or the Jinja text `template`."""

    name = "chat"

    def __init__(
        self,
        tokenizer: Any,
        visual_tokens: int,
        image_token: int = IMAGE_TOKEN,
        template: str | None = None,
    ) -> None:
        self.tokenizer, self.image = tokenizer, [image_token] * visual_tokens
        self.template = template or getattr(tokenizer, "chat_template", None)
        if not self.template:
            advice = "give one (--chat-template FILE), or train on captions (--template plain)"
            raise ValueError(f"{tokenizer.name_or_path}: has no chat template; {advice}")
        if not tokenizer.is_fast:
            what = "cannot say which characters a token stands for"
            raise ValueError(f"{tokenizer.name_or_path}: {what}; use its fast tokenizer")
        self.ends = sorted({*_one(tokenizer, "eos"), *self._end_of_turn()})

    def _end_of_turn(self) -> list[int]:
        """The special token that the template puts after an answer, if it puts one."""
        labels = self.encode(Sample("", [], None, [("user", "x"), ("assistant", "x")])).labels
        last = [one for one in labels if one != IGNORED][-1]
        return [last] if last in self.tokenizer.added_tokens_decoder else []

    def problem(self, sample: Sample) -> str | None:
        """Which fault keeps a sample from being used."""
        turns = sample.turns or _as_turns(sample)
        answers = [text for role, text in turns if role == "assistant"]
        if not answers or not all(text.strip() for text in answers):
            return "empty_captions"
        roles = [role for role, _ in turns]
        if "user" not in roles[: roles.index("assistant")]:
            return "missing_questions"
        marks = sum(text.count(MARK) for _, text in turns)
        return None if marks == len(sample.images) and "" not in sample.images else "missing_images"

    def longest(self, sample: Sample) -> int:
        text = self.render(sample.turns or _as_turns(sample))
        pieces = 1 + len(sample.images)  # a tokenizer may put a token of its own before each
        return len(sample.images) * len(self.image) + len(text.encode()) + pieces

    def render(self, turns: Sequence[tuple[str, str]], generate: bool = False) -> str:
        messages = [{"role": role, "content": text} for role, text in turns]
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=generate,
            )
        except Exception as error:  # whatever a template raises, jinja2's own class mostly
            roles = ", ".join(role for role, _ in turns)
            raise ValueError(f"the chat template refuses turns of {roles}: {error}") from error

    def encode(self, sample: Sample) -> Encoded:
        turns = sample.turns or _as_turns(sample)
        text, answers = self.render(turns), []
        for number, (role, _) in enumerate(turns):
            if role == "assistant":
                answers.append(self._answer(turns[: number + 1], text))
        return self._tokens(text, answers)

    def prompt(self, turns: Sequence[tuple[str, str]]) -> list[int]:
        """Ids that an answer is generated after."""
        return self._tokens(self.render(turns, generate=True), []).ids

    def question(self, sample: Sample) -> list[int]:
        """The prompt of a sample: everything before its last answer."""
        turns = sample.turns or _as_turns(sample)
        return self.prompt(turns[: self._last(turns)])

    def expected(self, sample: Sample) -> str:
        """What should be generated after it."""
        turns = sample.turns or _as_turns(sample)
        return turns[self._last(turns)][1].strip()

    def answered(self, sample: Sample, text: str) -> Sample:
        """The sample up to its last answer, with another text for it."""
        turns = sample.turns or _as_turns(sample)
        return sample._replace(turns=[*turns[: self._last(turns)], ("assistant", text)])

    @staticmethod
    def _last(turns: Sequence[tuple[str, str]]) -> int:
        return max(number for number, (role, _) in enumerate(turns) if role == "assistant")

    def _answer(self, turns: Sequence[tuple[str, str]], text: str) -> tuple[int, int]:
        """Where in `text` the last of `turns` and the token that ends it lie."""
        before, after = self.render(turns[:-1], generate=True), self.render(turns).rstrip()
        if not after.startswith(before) or not text.startswith(after):
            what = f"renders answer {turns[-1][1][:40]!r} in another way at the end of its text"
            advice = "give a template that only appends (--chat-template FILE)"
            raise ValueError(f"{self.tokenizer.name_or_path}: the chat template {what}; {advice}")
        return len(before), len(after)

    def _tokens(self, text: str, answers: Sequence[tuple[int, int]]) -> Encoded:
        ids: list[int] = []
        labels: list[int] = []
        begin = 0
        for match in [*re.finditer(re.escape(MARK), text), None]:
            end = match.start() if match else len(text)
            if end > begin:
                self._add(text[begin:end], begin, answers, ids, labels)
            if match:
                ids += self.image
                labels += [IGNORED] * len(self.image)
                begin = match.end()
        return Encoded(ids, labels)

    def _add(self, text: str, at: int, answers: Any, ids: list[int], labels: list[int]) -> None:
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        for token, (first, last) in zip(found["input_ids"], found["offset_mapping"], strict=True):
            begin, end = at + first, at + max(last, first + 1)
            inside = any(low <= begin and end <= high for low, high in answers)
            ids.append(token)
            labels.append(token if inside else IGNORED)


def _as_turns(sample: Sample) -> list[tuple[str, str]]:
    """A sample that only has a caption, as a conversation."""
    asked = "\n".join([MARK] * len(sample.images) + ["Describe the image."])
    return [("user", asked), ("assistant", (sample.caption or "").strip())]


def _one(tokenizer: Any, what: str) -> list[int]:
    token = getattr(tokenizer, f"{what}_token_id", None)
    if token is None and what == "eos":
        raise ValueError(f"{tokenizer.name_or_path}: has no EOS token to end a caption; set one")
    return [] if token is None else [int(token)]
