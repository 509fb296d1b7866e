"""Samples as token ids and labels: `Plain` for captions, `Chat` for conversations.

The ids of a sample hold `IMAGE_TOKEN` K times for an image; labels are -100 where there is no loss.

`Plain` (stage 1) encodes `[BOS][visual tokens]caption[EOS]`, with the loss on the caption and the
EOS that ends it. `Chat` (stage 2) runs the chat template of the tokenizer, with the loss on the
answers alone. A template is a program, so the place of an answer is found by running it. An answer
begins after the turns before it with the generation prompt, and ends at a mark that is put after
it, with what closes a turn up to the first added token. Where the template writes a prompt in
another way once turns follow, a mark before the answer tells its beginning.

The text is tokenized as a whole, as at inference, and labels come from the characters that a token
stands for. Spaces at the end of a generation prompt ("ASSISTANT: ") belong to the answer, since
most tokenizers join them to its first word; the prompt at inference ends before them. A token that
reaches over an end of an answer is labelled if its text without white space lies inside. A token
that also holds other text of the prompt is not, because at inference that text is given.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from ..interface.option_values import DEFAULT_QUESTION, TemplateName
from .conversation_files import IMAGE_MARK, Sample, Turn
from .model import IMAGE_TOKEN

IGNORED_LABEL = -100
_MARK = "\ue000"  # stands at an answer whose place is looked for; no text holds it
_WORD = re.compile(r"\S(?:.*\S)?", re.DOTALL)  # a text without white space around it
Span = tuple[int, int]  # the first character, and that after the last
FAULTS = {  # that make a sample unusable
    "missing_ids": "images whose id has no row",
    "without_ids": "entries have no `id`; with --ids row, write row numbers, from 0",
    "missing_images": "<image> marks and images differ in number, or no image where one must be",
    "empty_captions": "empty captions or answers",
    "missing_questions": "answers that no question stands before",
    "over_long": "longer than max_length (--max-length) or than the language model takes, with the "
    "visual tokens of an image (--visual-tokens)",
}


class Encoded(NamedTuple):
    """A sample as tokens, of the same number `T` each."""

    ids: list[int]
    labels: list[int]  # the ids, or `IGNORED_LABEL`


class Template:
    """Samples as tokens; a subclass says what the turns of a sample are, and how they are written.

    Args:
        tokenizer: of the language model.
        visual_tokens: K, how often `IMAGE_TOKEN` stands for an image.

    Raises:
        ValueError: the tokenizer has no EOS; for `Chat` also if it has no chat template or is slow,
            or the template does more to a text than append to it.
    """

    name: TemplateName
    turns: Callable[[Sample], list[Turn]]  # of a sample, that are trained on
    encode: Callable[[Sample], Encoded]  # the tokens of a sample; ValueError as in `fault`
    prompt: Callable[[Sample], list[int]]  # the ids after which the last answer is generated
    takes_text_alone = False  # samples without an image
    positions: int | None = None  # the longest input of the language model, if it has a limit

    def __init__(self, tokenizer: Any, visual_tokens: int) -> None:
        self.tokenizer, self.image_ids = tokenizer, [IMAGE_TOKEN] * visual_tokens
        self.pad_id = tokenizer.pad_token_id or 0
        if tokenizer.eos_token_id is None:
            fault = "has no EOS token to end a caption; set one"
            raise ValueError(f"{tokenizer.name_or_path}: {fault}")
        self.end_ids = [int(tokenizer.eos_token_id)]  # any of them ends a generated text

    def question(self, sample: Sample) -> list[Turn]:
        """Return the turns before the last answer."""
        turns = self.turns(sample)
        return turns[: max(n for n, (role, _) in enumerate(turns) if role == "assistant")]

    def reference(self, sample: Sample) -> str:
        """Return the text that should be generated: the last answer."""
        return [text for role, text in self.turns(sample) if role == "assistant"][-1].strip()

    def with_answer(self, sample: Sample, text: str) -> Sample:
        """Return the sample up to its last answer, with another text for it."""
        return sample._replace(caption=None, turns=[*self.question(sample), ("assistant", text)])

    def fault(self, sample: Sample, max_length: int | None = None) -> str | None:
        """Return the key of `FAULTS` of an unusable sample, or None; `max_length` is in tokens.

        ValueError if a chat template refuses the turns, or hides where an answer is.
        """
        turns = self.turns(sample)
        answers = [text for role, text in turns if role == "assistant"]
        if not answers or not all(text.strip() for text in answers):
            return "empty_captions"
        roles = [role for role, _ in turns]
        if "user" not in roles[: roles.index("assistant")]:
            return "missing_questions"
        marks = sum(text.count(IMAGE_MARK) for _, text in turns)
        if marks != len(sample.images) or not (marks or self.takes_text_alone):
            return "missing_images"
        if "" in sample.images:
            return "without_ids"
        ids, labels = self.encode(sample)
        if all(label == IGNORED_LABEL for label in labels):
            return "empty_captions"
        return "over_long" if max_length is not None and len(ids) > max_length else None


class Plain(Template):
    """Encodes captions as `[BOS][visual tokens]caption[EOS]`."""

    name: TemplateName = "plain"

    def turns(self, sample: Sample) -> list[Turn]:
        """Return the images of a sample, and its caption or last answer."""
        answers = [text for role, text in sample.turns if role == "assistant"]
        text = sample.caption if sample.caption is not None else ["", *answers][-1]
        return [("user", IMAGE_MARK * len(sample.images)), ("assistant", text)]

    def encode(self, sample: Sample) -> Encoded:
        """Return the token ids and labels of a sample."""
        prompt, text = self.prompt(sample), self.reference(sample)
        caption = self.tokenizer(text, add_special_tokens=False)["input_ids"] + self.end_ids
        return Encoded(prompt + caption, [IGNORED_LABEL] * len(prompt) + caption)

    def prompt(self, sample: Sample) -> list[int]:
        """Return the ids after which the caption is generated."""
        bos = self.tokenizer.bos_token_id
        return [bos] * (bos is not None) + self.image_ids * len(sample.images)


class Chat(Template):
    """Encodes conversations with the chat template of a tokenizer."""

    name: TemplateName = "chat"
    takes_text_alone = True
    _closing = re.compile("")  # what follows an answer, up to the added token that ends the turn

    def __init__(self, tokenizer: Any, visual_tokens: int) -> None:
        super().__init__(tokenizer, visual_tokens)
        if not getattr(tokenizer, "chat_template", None):
            advice = "give one (--chat-template FILE), or train on captions (--template plain)"
            raise ValueError(f"{tokenizer.name_or_path}: has no chat template; {advice}")
        self.template = tokenizer.get_chat_template()  # the default of several
        if not tokenizer.is_fast:
            reason = "cannot say which characters a token stands for; use its fast tokenizer"
            raise ValueError(f"{tokenizer.name_or_path}: {reason}")
        added = [token.content for token in tokenizer.added_tokens_decoder.values()]
        marks = sorted(filter(str.strip, added), key=len, reverse=True)  # the longest match
        added_tokens = re.compile("|".join(map(re.escape, marks)) or "(?!)")
        sample = Sample("", [], None, [("user", "x"), ("assistant", "x")])
        text, ((_, end),) = self._render_spans(sample.turns)
        end_of_turn = added_tokens.search(text, end)
        closing = text[end : end_of_turn.end()] if end_of_turn else text[end:].rstrip()
        if closing:
            self._closing = re.compile(r"\s*" + re.escape(closing))
        labels = self.encode(sample).labels
        last = [label for label in labels if label != IGNORED_LABEL][-1:]
        end_tokens = set(last) & set(tokenizer.added_tokens_decoder)
        self.end_ids = sorted({*self.end_ids, *end_tokens})

    def turns(self, sample: Sample) -> list[Turn]:
        """Return the turns of a sample; a caption alone answers a question about its images."""
        if sample.turns:
            return sample.turns
        question = "\n".join([IMAGE_MARK] * len(sample.images) + [DEFAULT_QUESTION])
        return [("user", question), ("assistant", (sample.caption or "").strip())]

    def render(self, turns: Sequence[Turn], generate: bool = False) -> str:
        """Return the text of a conversation, with the generation prompt if `generate`.

        ValueError if the template refuses the turns.
        """
        messages = [{"role": role, "content": text} for role, text in turns]
        options = {"chat_template": self.template, "add_generation_prompt": generate}
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))
        except Exception as error:  # a template can raise anything, most often a class of jinja2
            roles = ", ".join(role for role, _ in turns)
            raise ValueError(f"the chat template refuses turns of {roles}: {error}") from error

    def encode(self, sample: Sample) -> Encoded:
        """Return the token ids and labels of a sample; ValueError as in `fault`."""
        return self._tokenize(*self._render_spans(self.turns(sample)))

    def prompt(self, sample: Sample) -> list[int]:
        """Return the ids after which the last answer is generated."""
        before = self.render(self.question(sample), generate=True)
        return self._tokenize(before.rstrip(" "), []).ids

    def _render_spans(self, turns: Sequence[Turn]) -> tuple[str, list[Span]]:
        """Return the text of a conversation, and where its answers and their end tokens lie."""
        try:
            return self._spans_once(turns)
        except ValueError:  # a template may write the date, which changed between two renderings
            return self._spans_once(turns)

    def _spans_once(self, turns: Sequence[Turn]) -> tuple[str, list[Span]]:
        text, marked, answers = self.render(turns), [], []
        for role, content in turns:
            if role == "assistant":  # a template may strip it, which marks would keep it from
                answers.append(answer := content.strip())
                content = content.replace(answer, f"{_MARK}{answer}{_MARK}", 1)
            marked.append((role, content))
        pieces = self.render(marked).split(_MARK)
        if len(pieces) != 2 * len(answers) + 1 or "".join(pieces) != text:
            changed = next((a for a in answers if a not in text), "".join(answers[:1]))
            fault = f"the chat template renders answer {changed[:40]!r} in another way at the end "
            raise self._unusable(f"{fault}of its text; give one that only appends")
        if text.count(IMAGE_MARK) != sum(content.count(IMAGE_MARK) for _, content in turns):
            fault = f"the chat template leaves out or repeats a turn with {IMAGE_MARK}"
            raise self._unusable(f"{fault}; give a template that writes every turn once")
        numbers = [number for number, (role, _) in enumerate(turns) if role == "assistant"]
        before = [self.render(turns[:number], generate=True) for number in numbers]
        places, spans = list(accumulate(map(len, pieces))), []
        for prompt, start, end in zip(before, places[::2], places[1::2], strict=False):
            if text.startswith(prompt):  # else the template writes it in another way here
                start = len(prompt)
            closing = self._closing.match(text, end)
            spans.append((len(text[:start].rstrip(" ")), closing.end() if closing else end))
        return text, spans

    def _unusable(self, fault: str) -> ValueError:
        return ValueError(f"{self.tokenizer.name_or_path}: {fault} (--chat-template FILE)")

    def _tokenize(self, text: str, answers: Sequence[Span]) -> Encoded:
        """Tokenize the pieces of a text between its image marks; label the spans of `answers`."""
        encoded, offset = Encoded([], []), 0
        for piece in filter(None, re.split(f"({IMAGE_MARK})", text)):
            ids, labels = self.image_ids, [IGNORED_LABEL] * len(self.image_ids)
            if piece != IMAGE_MARK:
                tokens = self.tokenizer(
                    piece, add_special_tokens=False, return_offsets_mapping=True
                )
                ids, labels = tokens["input_ids"], []
                for token, (start, end) in zip(ids, tokens["offset_mapping"], strict=True):
                    end = max(end, start + 1)  # trimmed spaces stand before the next character
                    word = _WORD.search(piece, start, end)  # None for white space
                    first, after = word.span() if word else (start, end)
                    first, after = offset + first, offset + after
                    in_answer = any(low <= first and after <= high for low, high in answers)
                    labels.append(token if in_answer else IGNORED_LABEL)
            encoded.ids.extend(ids)
            encoded.labels.extend(labels)
            offset += len(piece)
        return encoded


TEMPLATES: dict[TemplateName, type[Template]] = {"plain": Plain, "chat": Chat}
