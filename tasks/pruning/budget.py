"""Budget: how many parameters pruning could take of a BERT's layers, told from its configuration alone."""

from typing import Any

from tasks.errors import StepRejected

WIDTH_MULTIPLE = 32  # a width that is no multiple of it is no faster than the next one that is


def count_column(kind: str, hidden: int) -> int:
    """Parameters that go with one input of the output projection that `heads` or `neurons` feed.

    A column of it, and for each module that makes that input (query, key and value, or one) a row and a bias.
    """
    return hidden + (3 if kind == "heads" else 1) * (hidden + 1)


def count_removable(fields: dict[str, Any]) -> int:
    """Parameters of all heads but one, and of all whole blocks of neurons but one, of the layers in `config.json`."""
    hidden, layers = fields["hidden_size"], fields["num_hidden_layers"]
    head = hidden // fields["num_attention_heads"]
    heads = fields.get("layer_heads") or [fields["num_attention_heads"]] * layers
    widths = fields.get("layer_widths") or [fields["intermediate_size"]] * layers
    columns = {
        "heads": sum(count - 1 for count in heads) * head,
        "neurons": sum((width - 1) // WIDTH_MULTIPLE for width in widths) * WIDTH_MULTIPLE,
    }
    return sum(count * count_column(kind, hidden) for kind, count in columns.items())


def require_budget(possible: int, budget: float) -> None:
    """Raises StepRejected when what each layer must keep leaves less than the budget."""
    if possible < budget:
        raise StepRejected(
            f"pruning asks for {budget:.0f} of the layers' parameters to go, {possible} can: "
            f"every layer keeps one head and {WIDTH_MULTIPLE} neurons; set ratio lower"
        )
