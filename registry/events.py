"""What the ledger records: verdicts, decisions, refusals, moves, proofs and collections. Each is written once."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from registry.approval import Approval
from registry.channel import ChannelName
from registry.gate import GateRecord
from registry.manifest import SafeName, Sha256

__all__ = [
    "Action", "Candidate", "Collected", "Decided", "Event", "Judged", "Moved", "Part", "Proved", "Refused", "Screened",
]  # fmt: skip


class Part(BaseModel):
    """A frozen record without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Judged(Part):
    """A gate's verdict on a bundle, whatever it was."""

    kind: Literal["gate"] = "gate"
    bundle: Sha256
    report: GateRecord


class Candidate(Part):
    """What `optimize` made of one variant, by the digest of its files, and the gate's verdict on it."""

    variant: SafeName
    built: Sha256
    report: GateRecord


class Screened(Part):
    """The gate's verdicts in a run of `optimize`, whatever they were, and the bundle of the candidate it chose.

    `bundle` is None where none passed, `champion` the bundle in production that they were measured beside.
    """

    kind: Literal["screening"] = "screening"
    candidates: tuple[Candidate, ...]
    champion: Sha256 | None
    bundle: Sha256 | None
    screened_by: str


class Decided(Part):
    """A person's or a policy's decision, yes or no."""

    kind: Literal["approval"] = "approval"
    approval: Approval


Action = Literal["push", "promote", "rollback", "verify"]


class Refused(Part):
    """Something that was not done: the error's name and text, and who had asked.

    `verify`: a running worker did not prove that it serves the bundle.
    """

    kind: Literal["refusal"] = "refusal"
    action: Action
    bundle: str = Field(max_length=256, description="the digest asked for, which need not be one")
    error: str
    reason: str
    asked_by: str


class Moved(Part):
    """A channel's move. `number` counts the channel's moves from 1; `replaced` is where it pointed before.

    `set` is a move by hand, past gate and approval. Only a rollback's `bundle` may be None: the channel points nowhere
    again, as before its first move.
    """

    kind: Literal["move", "rollback", "set"]
    channel: ChannelName
    bundle: Sha256 | None
    replaced: Sha256 | None
    number: int = Field(ge=1)
    moved_by: str = Field(min_length=1, max_length=256)
    reason: str = ""
    gate: Sha256 | None = None
    approvals: tuple[Approval, ...] = ()

    @model_validator(mode="after")
    def _only_a_rollback_empties(self) -> Self:
        if self.bundle is None and (self.kind != "rollback" or self.replaced is None):
            raise ValueError(f"a {self.kind} from {self.replaced} has no bundle to lead to")
        return self


class Proved(Part):
    """A running worker's own answers proved that it serves a bundle; cosines are to the teacher's embeddings."""

    kind: Literal["proof"] = "proof"
    bundle: Sha256
    worker: str
    model_version: str
    golden_mean: float
    golden_min: float
    live_mean: float
    live_min: float
    live_texts: int = Field(ge=1)
    asked_by: str


class Collected(Part):
    """Bundles that garbage collection is about to delete: from here on they can no longer be promoted."""

    kind: Literal["collection"] = "collection"
    bundles: tuple[Sha256, ...] = Field(min_length=1)
    collected_by: str = Field(min_length=1, max_length=256)


Event = Annotated[Judged | Screened | Decided | Refused | Moved | Proved | Collected, Field(discriminator="kind")]
