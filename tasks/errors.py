"""Every way the pipeline says no before it spends hours.

TaskError
├── TeacherRejected   the model folder is missing, damaged, or needs what we will not run
├── CorpusRejected    the corpus is missing, empty, too small, or holds what is not text
├── ExportFailed      the model cannot be exported, or the exported graph is not it
├── StepRejected      a recipe's step asks for what its model or its corpus cannot give
├── TrainingFailed    a training run broke down
├── QuantizationFailed  a variant could not be built
├── ArtifactMissing   the cache names an artifact that is gone
├── ArtifactChanged   the cache names an artifact whose files are no longer those it was made of
├── NothingBuilt      no variant that was asked for can be built on this node
├── SchedulerUnreachable  a Dask scheduler, or a worker of it, cannot run our tasks
├── ProfileInvalid    what was asked to be profiled cannot be, or its trace is empty
├── SourceUnreachable a bundle, model or worker to be evaluated cannot be read
├── VerificationFailed  a running worker does not serve the bundle it should, or not as well
├── NotWaiting        no promotion waits for an answer under that name
└── TrackingFailed    the tracking server cannot be reached, or refuses
"""


class TaskError(Exception):
    """Base of all pipeline errors; the message names the value and what would be right."""


class TeacherRejected(TaskError):
    """The teacher cannot be used."""


class CorpusRejected(TaskError):
    """The corpus cannot be used."""


class ExportFailed(TaskError):
    """The model cannot be exported, or the exported graph does not equal it."""


class StepRejected(TaskError):
    """A recipe's step asks for what its model or its corpus cannot give."""


class TrainingFailed(TaskError):
    """A training run broke down: its loss is no number, or a process of it died."""


class QuantizationFailed(TaskError):
    """A variant could not be built."""


class ArtifactMissing(TaskError):
    """A cached result names an artifact that is no longer there."""


class ArtifactChanged(TaskError):
    """A cached result names an artifact whose files were changed since it was made."""


class NothingBuilt(TaskError):
    """No variant that was asked for can be built on this node."""


class SchedulerUnreachable(TaskError):
    """No Dask scheduler answers, or its workers cannot run our tasks."""


class ProfileInvalid(TaskError):
    """What was asked to be profiled cannot be, or its trace holds nothing to summarise."""


class SourceUnreachable(TaskError):
    """A model, bundle or worker named for evaluation does not answer as one."""


class VerificationFailed(TaskError):
    """A running worker does not answer, does not serve the bundle it should, or not as well as it was measured."""


class TrackingFailed(TaskError):
    """MLflow cannot be reached or refuses what it is asked."""


class NotWaiting(TaskError):
    """No promotion waits for an answer under that name, or it takes none any more."""
