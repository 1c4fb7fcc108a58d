"""Lists of prompts: finding, reading and checking them.

A list is a file in one of the ``formats``, a packaged or a public list. GenEval's lists and that of ImageNet's classes
are generated on demand. A list may repeat prompts: training draws such a prompt more often, evaluation uses it once.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from alignbench.config import UserError, did_you_mean, read_text
from alignbench.evaluator import Prompt
from alignbench.prompts import formats, geneval, public
from alignbench.prompts.public import SETS

SHAPES = Path(__file__).parents[1] / "shapes" / "assets" / "prompts"
SPLITS = ("train", "val", "test")
CLASSES = 1000  # classes of ImageNet


def classes() -> list[dict[str, Any]]:
    """Return a prompt for every class of ImageNet: its index, as text."""
    return [{"prompt": str(index), "tag": ""} for index in range(CLASSES)]


GENERATED = {"geneval/train": geneval.train, "geneval/test": geneval.test, "imagenet/classes": classes}


def prompt_id(text: str) -> str:
    """Return the id of a prompt: twelve hex digits of the sha256 of its text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def locate(name: str, where: str) -> Path:
    """Return the file that ``name`` means: that of a packaged list, of a public set, or the path itself.

    A list that is generated on demand has no file; its name is returned as a path. ``where``: the setting to name in
    errors. Raise UserError for a name that means nothing, and Missing for a public set that is not on this machine.
    """
    if name in SETS and not Path(name).exists():
        return public.cached(SETS[name], where)
    world, _, split = name.partition("/")
    if world in ("geneval", "imagenet") and not Path(name).exists():
        if name not in GENERATED:
            raise UserError(f"{where}: there are no prompts '{name}'{did_you_mean(name, GENERATED)}")
        return Path(name)
    if world == "shapes" and not Path(name).exists():
        if split not in SPLITS:
            raise UserError(f"{where}: there are no prompts '{name}'{did_you_mean(split, SPLITS, 'shapes/')}")
        return SHAPES / f"{split}.jsonl"
    if Path(name).suffix.lower() not in formats.READERS:
        raise UserError(
            f"{where}: {name!r} is not a prompt file; give a {', '.join(formats.READERS)} file, shapes/train, /val, "
            f"/test, {', '.join([*GENERATED, *SETS])}"
        )
    return Path(name)


def load_prompts(name: str, where: str = "prompts") -> list[Prompt]:
    """Return the prompts of the list ``name``, in order, those that repeat an earlier one included.

    Space around a prompt is left out, and a tab or line break within it is a space. Raise UserError ("where: file:line:
    ...") for the first line that is empty or malformed, and as ``locate`` does.
    """
    if name in SETS and not Path(name).exists():
        return [Prompt(prompt_id(text), _plain(text, name), tag) for text, tag in public.rows(name, where)]
    path = locate(name, where)
    if name in GENERATED and not path.exists():
        return list(_generate(name))
    try:
        stat = path.stat()
        return list(_read(path, (stat.st_size, stat.st_mtime_ns)))
    except (OSError, ValueError) as error:
        what = getattr(error, "strerror", None) or error
        raise UserError(f"{where}: {str(path)!r}: cannot be read: {what}; give the path of a prompt file") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def evaluation_prompts(name: str, where: str = "prompts") -> list[Prompt]:
    """Return the prompts of the list ``name``, in order, each once. Raise UserError as ``load_prompts`` does."""
    first = dict[str, Prompt]()
    for prompt in load_prompts(name, where):
        first.setdefault(prompt.id, prompt)
    return list(first.values())


@functools.cache
def _generate(name: str) -> tuple[Prompt, ...]:
    """Return a generated list. A prompt may occur more than once in a training list: that is its weight there."""
    return tuple(Prompt(prompt_id(line["prompt"]), line["prompt"], line["tag"], line) for line in GENERATED[name]())


@functools.lru_cache(maxsize=16)  # a sweep asks for the same few lists once per run
def _read(path: Path, state: tuple[int, int]) -> tuple[Prompt, ...]:
    """Read a file. ``state``: size and modification time, so that a changed file is read again."""
    if not state[0]:
        raise UserError(f"{path}: the file is empty; write one prompt per line")
    prompts = tuple(map(_prompt, formats.read(path)))
    if not prompts:
        raise UserError(f"{path}: the file has no prompts")
    return prompts


def _prompt(line: formats.Line) -> Prompt:
    text = _plain(line.text, line.spot)  # first: half a surrogate pair has no id
    return Prompt(prompt_id(text), text, line.tag, line.metadata)


def parse_prompt(line: str, spot: str) -> Prompt:
    """Return the prompt on a line of a .jsonl file. Raise UserError for a line that is unusable.

    ``spot``: file and line number, for errors.
    """
    return _prompt(formats.json_line(line, spot))


INVISIBLE = ("Cf", "Zs", "Zl", "Zp")  # categories of spaces and of what has no width
BREAKS = re.compile(r"\s*[\t\n\r\v\f\x1c-\x1f\x85\u2028\u2029]\s*")


def _plain(text: str, spot: str) -> str:
    """Return a prompt on one line, without space or byte-order marks around it. Raise UserError for unusable text."""
    text = BREAKS.sub(" ", text.strip("\ufeff")).strip()
    if all(unicodedata.category(character) in INVISIBLE for character in text):
        raise UserError(f"{spot}: the prompt is empty; remove the line")
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs"):
            what = f"the control character U+{ord(character):04X} inside the prompt {text!r}"
            raise UserError(f"{spot}: {what}; write plain text")
    return text


def digest(prompts: Sequence[Prompt]) -> str:
    """Return the sha256 of a list: texts, tags and metadata, in order; all that training and scoring see of it."""
    plain = json.dumps([prompt[1:] for prompt in prompts], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(plain.encode()).hexdigest()


def check_vocabulary(prompts: Sequence[Prompt], name: str, tokenizers: Sequence[Path], where: str = "prompts") -> None:
    """Raise UserError for the first prompt that the model's text encoders cannot read in full. Loads no model.

    ``name``: of the list; ``tokenizers``: the encoders' ``tokenizer.json`` files. A byte-level tokenizer can represent
    every text. If a model has one (FLUX.1's CLIP), no prompt is refused, although another encoder (T5) may lack tokens
    for '{' or '~'.
    """
    if any(_reads_bytes(file) for file in tokenizers):
        return
    for file in tokenizers:
        unknown = _unknown_pieces(file)
        for number, prompt in enumerate(prompts, 1):
            if piece := unknown(prompt.text):
                spot = f"{locate(name, where)}: prompt {number}"
                raise UserError(
                    f"{spot}: the model's text encoder has no token for {piece!r} in {prompt.text!r}; "
                    "write the prompt without it"
                )


BYTES = 256


def _reads_bytes(file: Path) -> bool:
    """Return whether a tokenizer has a token for each of the 256 characters that stand for bytes."""
    vocabulary = json.loads(read_text(file))["model"].get("vocab")
    return isinstance(vocabulary, dict) and sum(len(token) == 1 for token in vocabulary) >= BYTES


def _unknown_pieces(file: Path) -> Callable[[str], str]:
    """Return a function: text -> its first piece that becomes the unknown token, or ""."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    model = json.loads(read_text(file))["model"]
    unk = tokenizer.token_to_id(model["unk_token"]) if model.get("unk_token") else model.get("unk_id")

    def first(text: str) -> str:
        encoded = tokenizer.encode(text, add_special_tokens=False)
        spans = (span for token, span in zip(encoded.ids, encoded.offsets) if token == unk)
        return next((text[a:b].strip() for a, b in spans), "")

    return first


def longer_than(limit: int, prompts: Sequence[Prompt], folder: Path) -> list[Prompt]:
    """Return the prompts of more than ``limit`` tokens, start and end included. ``folder``: the tokenizer's."""
    texts = {prompt.text: prompt for prompt in prompts if len(prompt.text.encode()) + 2 > limit}  # a token has a byte
    if not texts:
        return []
    lengths = _token_counts(folder, tuple(texts))
    return [prompt for prompt, length in zip(texts.values(), lengths) if length > limit]


@functools.lru_cache(maxsize=16)
def _token_counts(folder: Path, texts: tuple[str, ...]) -> list[int]:
    if (file := folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return [len(encoded.ids) for encoded in tokenizer.encode_batch(list(texts))]
    from transformers import AutoTokenizer

    slow = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return [len(ids) for ids in slow(list(texts), verbose=False)["input_ids"]]
