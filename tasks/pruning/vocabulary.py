"""Vocabulary trimming: the word pieces that a corpus uses least go, with their rows of the embedding table.

A word that lost its piece is spelled with the pieces left. Texts that never used a lost piece get the tokens they had,
and no text gets an unknown token that had none before: a piece for every single character stays.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import task
from tokenizers import Tokenizer

from serving.tokenizer import TOKENIZER_NAME
from tasks.artifacts import CACHED, Artifact, draft
from tasks.corpus import read_part
from tasks.errors import StepRejected
from tasks.models.teacher import Teacher, load_sentence_transformer
from tasks.models.weights import write_weights
from tasks.steps import TrimConfig, copy_model, describe_step, transformer_folder, write_step

_BATCH = 2000
_ID_FIELDS = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id")


@task(task_run_name="trim-{config.ratio}", cache_policy=CACHED, persist_result=True, result_serializer="json")
def trim_vocabulary(start: Teacher, teacher: Teacher, config: TrimConfig, corpus: Artifact) -> Artifact:
    """`start` without `config.ratio` of its word pieces, those that the calibration and distillation parts use least.

    Pieces that they use equally often, or never, stay in the order of the vocabulary, which for BERT's is by frequency
    in what it was made of. Raises StepRejected.
    """
    num_pieces = require_trimmable(start, config)
    description = json.loads(start.tokenizer.read_text(encoding="utf-8"))
    counts = count_pieces(start.tokenizer, seen_texts(corpus))
    kept = choose_pieces(start.name, description, counts, num_pieces)
    with draft("trim") as work:
        copy_model(start.folder, work.folder)
        place = transformer_folder(work.folder)
        write_tokenizer(place, description, kept)
        write_embeddings(start, place, kept)
        gone = set(description["model"]["vocab"].values()) - set(kept)
        details = {
            "num_pieces": len(kept),
            "pieces_before": len(description["model"]["vocab"]),
            "share_of_tokens_respelled": sum(counts[piece] for piece in gone) / max(counts.total(), 1),
        }
        write_step(work.folder, describe_step(work.folder, config, start, teacher, corpus, details))
    return work.artifact


def require_trimmable(start: Teacher, config: TrimConfig, pieces_before: int | None = None) -> int:
    """How many pieces `config` leaves of the vocabulary of `start`, or of `pieces_before` that earlier trimming left.

    Raises StepRejected where the vocabulary is not one of word pieces, or what must stay is more.
    """
    description = json.loads(start.tokenizer.read_text(encoding="utf-8"))
    _require_word_pieces(start, description)
    num_pieces = round((1 - config.ratio) * (pieces_before or len(description["model"]["vocab"])))
    _pin_pieces(start.name, description, num_pieces)
    return num_pieces


def seen_texts(corpus: Artifact) -> list[str]:
    """Every text of the corpus that is not kept for evaluation."""
    return [*read_part(corpus, "calibration"), *read_part(corpus, "distillation")]


def count_pieces(tokenizer: Path, texts: Sequence[str]) -> Counter[int]:
    """How often each id comes out of `texts`, whole texts, without special tokens."""
    counter = Tokenizer.from_file(str(tokenizer))
    counter.no_padding()
    counter.no_truncation()
    counts: Counter[int] = Counter()
    for start in range(0, len(texts), _BATCH):
        for encoding in counter.encode_batch_fast(texts[start : start + _BATCH], add_special_tokens=False):
            counts.update(encoding.ids)
    return counts


def _require_word_pieces(start: Teacher, description: dict[str, Any]) -> None:
    kind = description["model"].get("type")
    if kind != "WordPiece":
        raise StepRejected(f"{start.name} has a {kind} tokenizer: vocabulary trimming knows WordPiece")
    ids = sorted(description["model"]["vocab"].values())
    if ids != list(range(len(ids))):
        raise StepRejected(
            f"{start.name}: the {len(ids)} pieces of {TOKENIZER_NAME} are not numbered 0 to {len(ids) - 1}"
        )
    outside = [token["content"] for token in description["added_tokens"] if token["id"] >= len(ids)]
    if outside:
        raise StepRejected(
            f"{start.name}: added token {outside[0]!r} is no piece of the vocabulary, trimming needs it there"
        )


def choose_pieces(name: str, description: dict[str, Any], counts: Counter[int], num_pieces: int) -> list[int]:
    """Ids to keep, ascending. Raises StepRejected where that leaves out what must stay."""
    vocabulary: dict[str, int] = description["model"]["vocab"]
    pinned = _pin_pieces(name, description, num_pieces)
    # Numbers of tokens that never were given a meaning, and that no text is split into.
    unused = {number for piece, number in vocabulary.items() if piece.startswith("[unused")} - pinned
    ranked = sorted(set(vocabulary.values()) - pinned - unused, key=lambda number: (-counts[number], number))
    return sorted(pinned | set(ranked[: num_pieces - len(pinned)]))


def _pin_pieces(name: str, description: dict[str, Any], num_pieces: int) -> set[int]:
    """Ids of the pieces that stay whatever is asked for. Raises StepRejected where that is less."""
    vocabulary: dict[str, int] = description["model"]["vocab"]
    prefix = description["model"]["continuing_subword_prefix"]
    pinned = {token["id"] for token in description["added_tokens"]}
    pinned |= {number for piece, number in vocabulary.items() if len(piece.removeprefix(prefix)) == 1}
    if num_pieces < len(pinned):
        raise StepRejected(
            f"trimming to {num_pieces} pieces: {len(pinned)} special tokens and single characters of {name} stay"
        )
    _require_spelling(name, vocabulary, prefix, pinned)
    return pinned


def _require_spelling(name: str, vocabulary: dict[str, int], prefix: str, pinned: set[int]) -> None:
    """Every piece can be spelled with single characters: else a word could come out unknown that was known."""
    for piece, number in vocabulary.items():
        if number in pinned or piece.startswith("[unused"):
            continue
        body = piece.removeprefix(prefix)
        letters = [body[0] if body == piece else prefix + body[0], *(prefix + letter for letter in body[1:])]
        missing = next((letter for letter in letters if letter not in vocabulary), None)
        if missing is not None:
            raise StepRejected(
                f"{name} has no piece {missing!r}, which spelling {piece!r} needs: words could become unknown"
            )


def write_tokenizer(place: Path, description: dict[str, Any], kept: Sequence[int]) -> None:
    """tokenizer.json with the pieces of `kept` alone, numbered anew in the same order, and what refers to numbers."""
    new = {number: index for index, number in enumerate(kept)}
    fields = json.loads(json.dumps(description))
    vocabulary = sorted(description["model"]["vocab"].items(), key=lambda item: item[1])
    fields["model"]["vocab"] = {piece: new[number] for piece, number in vocabulary if number in new}
    for token in fields["added_tokens"]:
        token["id"] = new[token["id"]]
    if fields.get("padding"):
        fields["padding"]["pad_id"] = new[fields["padding"]["pad_id"]]
    _renumber(fields.get("post_processor"), new)
    (place / TOKENIZER_NAME).write_text(json.dumps(fields, ensure_ascii=False), encoding="utf-8")
    if (place / "vocab.txt").is_file():
        (place / "vocab.txt").write_text("\n".join(fields["model"]["vocab"]) + "\n", encoding="utf-8")
    path = place / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "added_tokens_decoder" in settings:
        tokens = settings["added_tokens_decoder"].items()
        settings["added_tokens_decoder"] = {str(new[int(number)]): token for number, token in tokens}
        path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def _renumber(processor: dict[str, Any] | None, new: dict[int, int]) -> None:
    """The special tokens of a TemplateProcessing, or of a BertProcessing (`cls`, `sep`), in place."""
    for token in (processor or {}).get("special_tokens", {}).values():
        token["ids"] = [new[number] for number in token["ids"]]
    for key in ("cls", "sep"):
        if key in (processor or {}):
            processor[key][1] = new[processor[key][1]]  # type: ignore[index]
    for part in (processor or {}).get("processors", ()):
        _renumber(part, new)


def write_embeddings(start: Teacher, place: Path, kept: Sequence[int]) -> None:
    """The weights with the rows of `kept` alone, and the configuration that says how many they are."""
    import torch  # noqa: PLC0415  a cached run need not load it

    encoder = load_sentence_transformer(start.folder)[0].auto_model
    words = encoder.get_input_embeddings()
    table = getattr(words, "table", words)  # a factorised one has its rows there
    if len(table.weight) != encoder.config.vocab_size:
        raise StepRejected(
            f"{start.name}: its embedding table has {len(table.weight)} rows, vocab_size is {encoder.config.vocab_size}"
        )
    table.weight = torch.nn.Parameter(table.weight.detach()[torch.tensor(kept)])
    write_weights(place / "model.safetensors", encoder)
    new = {number: index for index, number in enumerate(kept)}
    path = place / "config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields |= {key: new.get(fields[key]) for key in _ID_FIELDS if fields.get(key) is not None}
    path.write_text(json.dumps(fields | {"vocab_size": len(kept)}, indent=1) + "\n", encoding="utf-8")
