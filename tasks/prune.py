"""Structured pruning: the attention heads and feed-forward neurons whose removal costs the embeddings least go.

One budget for all layers, spent where a parameter is worth least; what is left is fitted to the original, then taught.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import task

from tasks.artifacts import CACHED, Artifact, draft
from tasks.corpus import read_calibration
from tasks.distillation.teach import require_same_tokenizer, teach, training_rows
from tasks.errors import StepRejected
from tasks.models.teacher import BERT_TYPES, Teacher, load_sentence_transformer
from tasks.models.weights import write_weights
from tasks.progress import progress
from tasks.pruning.budget import WIDTH_MULTIPLE, count_removable, require_budget
from tasks.pruning.vocabulary import count_pieces, seen_texts
from tasks.steps import PruneConfig, copy_model, describe_step, transformer_folder, write_step

if TYPE_CHECKING:
    from tasks.pruning.importance import Removals


@task(task_run_name="prune-{config.ratio}", cache_policy=CACHED, persist_result=True, result_serializer="json")
def prune(start: Teacher, teacher: Teacher, config: PruneConfig, corpus: Artifact) -> Artifact:
    """`start` with `config.ratio` of its layers' parameters removed, taught by `teacher` on the distillation part.

    Raises StepRejected and CorpusRejected before anything is measured, TrainingFailed.
    """
    from tasks.pruning.cut import cut  # noqa: PLC0415  a cached run need not load torch
    from tasks.pruning.importance import measure, order_all  # noqa: PLC0415
    from tasks.pruning.reconstruct import reconstruct  # noqa: PLC0415

    require_prunable(start, config)
    require_same_tokenizer(start, teacher)
    texts = read_calibration(corpus, config.calibration_size, f"{start.name}: {config}")
    rows = training_rows(start, corpus, config)
    model = load_sentence_transformer(start.folder)
    with progress("measure heads and neurons", len(texts)) as advance:
        removals = order_all(model, measure(model, texts, advance), WIDTH_MULTIPLE)
    gone = choose_removals(removals, config.ratio * start.num_encoder_parameters)
    smaller = cut(model, gone, config.embedding_ratio, count_pieces(start.tokenizer, seen_texts(corpus)))
    original = load_sentence_transformer(teacher.folder)
    with progress("fit the layers", len(removals) // 2) as advance:
        reconstruct(smaller, original, texts, advance)
    with draft("prune") as work:
        write_pruned(start, smaller, work.folder)
        trained = teach(work.folder, teacher, rows, config)
        details = describe_cut(removals, gone, smaller) | trained.model_dump(mode="json", exclude={"seconds"})
        write_step(work.folder, describe_step(work.folder, config, start, teacher, corpus, details))
    return work.artifact


def require_prunable(start: Teacher, config: PruneConfig) -> None:
    """Raises StepRejected for a type of model whose layers pruning cannot cut, and for more than can be cut of them."""
    fields = json.loads((start.tokenizer.parent / "config.json").read_text(encoding="utf-8"))
    kind = fields.get("model_type")
    if kind not in BERT_TYPES:
        raise StepRejected(f"{start.name} is of type {kind!r}: pruning knows {' and '.join(BERT_TYPES)}")
    require_budget(count_removable(fields), config.ratio * start.num_encoder_parameters)


def choose_removals(removals: "Removals", budget: float) -> "Removals":
    """Which of each projection's removals are made: the cheapest a parameter, until at least `budget` are gone.

    Raises StepRejected when what each layer must keep leaves less than the budget.
    """
    possible = sum(removal.num_parameters for queue in removals.values() for removal in queue)
    require_budget(possible, budget)
    taken = dict.fromkeys(removals, 0)
    while budget > 0:
        nexts = {place: queue[taken[place]] for place, queue in removals.items() if taken[place] < len(queue)}
        place = min(nexts, key=lambda place: nexts[place].error / nexts[place].num_parameters)
        taken[place] += 1
        budget -= nexts[place].num_parameters
    return {place: removals[place][:count] for place, count in taken.items()}


def describe_cut(removals: "Removals", gone: "Removals", smaller: Any) -> dict[str, Any]:
    """What `step.json` says of the cut: heads and neurons of each layer, now and before, and what each could cost."""
    encoder = smaller[0].auto_model
    head = encoder.encoder.layer[0].attention.self.attention_head_size
    lost = {place: sum(len(removal.columns) for removal in queue) for place, queue in gone.items()}
    heads, widths = encoder.config.layer_heads, encoder.config.layer_widths
    return {
        "heads": heads,
        "heads_before": [now + lost[number, "heads"] // head for number, now in enumerate(heads)],
        "widths": widths,
        "widths_before": [now + lost[number, "neurons"] for number, now in enumerate(widths)],
        "embedding_rank": encoder.config.embedding_rank,
        "errors": {
            f"{number} {kind}": [removal.error for removal in queue] for (number, kind), queue in removals.items()
        },
    }


def write_pruned(start: Teacher, smaller: Any, folder: Path) -> None:
    """The model folder of `start` with the smaller model's weights and shapes."""
    copy_model(start.folder, folder)
    place = transformer_folder(folder)
    smaller[0].auto_model.config.save_pretrained(place)
    write_weights(place / "model.safetensors", smaller[0].auto_model)
