"""Samples as token ids and labels: `Plain` for captions, `Chat` for conversations.

The ids of a sample hold `IMAGE_TOKEN` K times for an image; labels are -100 where there is no loss.

`Plain` (stage 1) encodes `[BOS][visual tokens]caption[EOS]`, with the loss on the caption and the
EOS that ends it. `Chat` (stage 2) runs the chat template of the tokenizer, with the loss on the
answers alone. A template is a program, so the place of an answer is found by running it: the text
with the answer begins with the text before it plus the generation prompt, and what follows is the
answer with its end-of-turn token. The text is tokenized as a whole, as at inference, and a token
is labelled if it lies inside an answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from .conversation_files import IMAGE_MARK, Sample, Turn
from .projector import IMAGE_TOKEN, TemplateName

IGNORED_LABEL = -100
DEFAULT_QUESTION = "Describe the image."
Fault = Literal["missing_ids", "missing_images", "empty_captions", "missing_questions", "over_long"]


class Encoded(NamedTuple):
    """A sample as tokens, of the same number `T` each."""

    ids: list[int]
    labels: list[int]  # the ids, or `IGNORED_LABEL`


class Plain:
    """Encodes captions as `[BOS][visual tokens]caption[EOS]`."""

    name: TemplateName = "plain"

    def __init__(self, tokenizer: Any, visual_tokens: int, image_token: int = IMAGE_TOKEN) -> None:
        """Encode an image as `visual_tokens` (K) times `image_token`, text with `tokenizer`."""
        self.tokenizer, self.image_ids = tokenizer, [image_token] * visual_tokens
        self.bos_ids = _special_ids(tokenizer, "bos")
        self.end_ids = _special_ids(tokenizer, "eos")  # any of them ends a generated text

    def reference(self, sample: Sample) -> str:
        """Return the text that should be generated: the caption, else the last answer."""
        if sample.caption is not None:
            return sample.caption.strip()
        answers = [text for role, text in sample.turns if role == "assistant"]
        return answers[-1].strip() if answers else ""

    def fault(self, sample: Sample) -> Fault | None:
        """Return the fault that makes a sample unusable, or None."""
        if not sample.images or sample.images == [""]:
            return "missing_images"
        return None if self.reference(sample) else "empty_captions"

    def max_tokens(self, sample: Sample) -> int:
        """Return an upper bound of the tokens of a sample: each stands for at least one byte."""
        return len(sample.images) * len(self.image_ids) + len(self.reference(sample).encode()) + 3

    def encode(self, sample: Sample) -> Encoded:
        """Return the token ids and labels of a sample."""
        prompt = self.prompt(sample)
        caption = self.tokenizer(self.reference(sample), add_special_tokens=False)["input_ids"]
        caption = caption + self.end_ids
        return Encoded(prompt + caption, [IGNORED_LABEL] * len(prompt) + caption)

    def prompt(self, sample: Sample) -> list[int]:
        """Return the ids after which the caption is generated."""
        return self.bos_ids + self.image_ids * len(sample.images)

    def with_answer(self, sample: Sample, text: str) -> Sample:
        """Return the sample with another caption."""
        return sample._replace(caption=text)


class Chat:
    """Encodes conversations with the chat template of a tokenizer."""

    name: TemplateName = "chat"

    def __init__(
        self,
        tokenizer: Any,
        visual_tokens: int,
        image_token: int = IMAGE_TOKEN,
        template: str | None = None,
    ) -> None:
        """Encode an image as `visual_tokens` (K) times `image_token`, text with `tokenizer`.

        `template` is a Jinja text in place of the tokenizer's. ValueError if there is no template
        or no EOS, the tokenizer is slow, or the template does more to a text than append to it.
        """
        self.tokenizer, self.image_ids = tokenizer, [image_token] * visual_tokens
        self.template = template or getattr(tokenizer, "chat_template", None)
        if not self.template:
            raise ValueError(
                f"{tokenizer.name_or_path}: has no chat template; give one (--chat-template FILE), "
                "or train on captions (--template plain)"
            )
        if not tokenizer.is_fast:
            raise ValueError(
                f"{tokenizer.name_or_path}: cannot say which characters a token stands for; use "
                "its fast tokenizer"
            )
        # Any of them ends a generated text.
        self.end_ids = sorted({*_special_ids(tokenizer, "eos"), *self._end_of_turn()})

    def _end_of_turn(self) -> list[int]:
        """Return the special token that the template puts after an answer, if it puts one."""
        labels = self.encode(Sample("", [], None, [("user", "x"), ("assistant", "x")])).labels
        last = [label for label in labels if label != IGNORED_LABEL][-1]
        return [last] if last in self.tokenizer.added_tokens_decoder else []

    def fault(self, sample: Sample) -> Fault | None:
        """Return the fault that makes a sample unusable, or None."""
        turns = _turns(sample)
        answers = [text for role, text in turns if role == "assistant"]
        if not answers or not all(text.strip() for text in answers):
            return "empty_captions"
        roles = [role for role, _ in turns]
        if "user" not in roles[: roles.index("assistant")]:
            return "missing_questions"
        marks = sum(text.count(IMAGE_MARK) for _, text in turns)
        return None if marks == len(sample.images) and "" not in sample.images else "missing_images"

    def max_tokens(self, sample: Sample) -> int:
        """Return an upper bound of the tokens of a sample: each stands for at least one byte."""
        text = self.render(_turns(sample))
        pieces = 1 + len(sample.images)  # a tokenizer may put a token of its own before each
        return len(sample.images) * len(self.image_ids) + len(text.encode()) + pieces

    def render(self, turns: Sequence[Turn], generate: bool = False) -> str:
        """Return the text of a conversation, with the generation prompt if `generate`.

        Raises:
            ValueError: the template refuses the turns.
        """
        messages = [{"role": role, "content": text} for role, text in turns]
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=generate,
            )
        except Exception as error:  # a template can raise anything, most often a class of jinja2
            roles = ", ".join(role for role, _ in turns)
            raise ValueError(f"the chat template refuses turns of {roles}: {error}") from error
        return text

    def encode(self, sample: Sample) -> Encoded:
        """Return the token ids and labels of a sample."""
        turns = _turns(sample)
        text = self.render(turns)
        answers = [
            self._answer_span(turns[: number + 1], text)
            for number, (role, _) in enumerate(turns)
            if role == "assistant"
        ]
        return self._tokenize(text, answers)

    def prompt(self, sample: Sample) -> list[int]:
        """Return the ids after which the last answer is generated."""
        turns = _turns(sample)
        before = turns[: _last_answer(turns)]
        return self._tokenize(self.render(before, generate=True), []).ids

    def reference(self, sample: Sample) -> str:
        """Return the text that should be generated: the last answer."""
        turns = _turns(sample)
        return turns[_last_answer(turns)][1].strip()

    def with_answer(self, sample: Sample, text: str) -> Sample:
        """Return the sample up to its last answer, with another text for it."""
        turns = _turns(sample)
        return sample._replace(turns=[*turns[: _last_answer(turns)], ("assistant", text)])

    def _answer_span(self, turns: Sequence[Turn], text: str) -> tuple[int, int]:
        """Return where in `text` the last of `turns` and the token that ends it begin and end."""
        before, after = self.render(turns[:-1], generate=True), self.render(turns).rstrip()
        if not after.startswith(before) or not text.startswith(after):
            raise ValueError(
                f"{self.tokenizer.name_or_path}: the chat template renders answer "
                f"{turns[-1][1][:40]!r} in another way at the end of its text; give a template "
                "that only appends (--chat-template FILE)"
            )
        return len(before), len(after)

    def _tokenize(self, text: str, answers: Sequence[tuple[int, int]]) -> Encoded:
        """Tokenize the pieces of a text between its image marks; label the spans of `answers`."""
        encoded = Encoded([], [])
        start = 0
        for match in [*re.finditer(re.escape(IMAGE_MARK), text), None]:
            end = match.start() if match else len(text)
            if end > start:
                self._append_piece(encoded, text[start:end], start, answers)
            if match:
                encoded.ids.extend(self.image_ids)
                encoded.labels.extend([IGNORED_LABEL] * len(self.image_ids))
                start = match.end()
        return encoded

    def _append_piece(
        self, encoded: Encoded, piece: str, offset: int, answers: Sequence[tuple[int, int]]
    ) -> None:
        """Append the tokens of a piece of text that begins at character `offset`."""
        tokens = self.tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)
        for token, (first, last) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True):
            start, end = offset + first, offset + max(last, first + 1)
            in_answer = any(low <= start and end <= high for low, high in answers)
            encoded.ids.append(token)
            encoded.labels.append(token if in_answer else IGNORED_LABEL)


Template = Plain | Chat
TEMPLATES: dict[TemplateName, type[Plain] | type[Chat]] = {"plain": Plain, "chat": Chat}


def _turns(sample: Sample) -> list[Turn]:
    """Return the turns of a sample; a caption alone answers a question about its images."""
    if sample.turns:
        return sample.turns
    question = "\n".join([IMAGE_MARK] * len(sample.images) + [DEFAULT_QUESTION])
    return [("user", question), ("assistant", (sample.caption or "").strip())]


def _last_answer(turns: Sequence[Turn]) -> int:
    return max(number for number, (role, _) in enumerate(turns) if role == "assistant")


def _special_ids(tokenizer: Any, name: Literal["bos", "eos"]) -> list[int]:
    token = getattr(tokenizer, f"{name}_token_id", None)
    if token is None and name == "eos":
        raise ValueError(f"{tokenizer.name_or_path}: has no EOS token to end a caption; set one")
    return [] if token is None else [int(token)]
