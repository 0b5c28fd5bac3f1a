"""Every way the registry says no.

RegistryError
├── ManifestInvalid     the manifest is not one we can read
├── DigestMismatch      a file, manifest or bundle is not the one its digest names
├── BundleIncomplete    a file the manifest lists is not there
├── ReferenceInvalid    a model, channel or digest spelled in a way that can name nothing
├── BundleNotFound      nothing under that name or digest
├── AmbiguousDigest     a short digest that fits several bundles
├── ChannelMoved        somebody moved the channel first
├── ChannelNotFound     the channel has never been set
├── RecordInvalid       a record in the store is not one we can read
├── TargetExists        something else lies where the bundle should go
└── StoreFull           the disk has no room
"""


class RegistryError(Exception):
    """Base of all registry errors; the message names the value and the limit."""


class ManifestInvalid(RegistryError):
    """The manifest is missing, is not JSON, has unknown keys or a value out of range."""


class DigestMismatch(RegistryError):
    """Bytes do not hash to the digest that names them."""


class BundleIncomplete(RegistryError):
    """A file listed in the manifest is missing, or an unlisted one is there."""


class ReferenceInvalid(RegistryError):
    """Not a model name, one of the channels, or at least eight hex digits of a digest."""


class BundleNotFound(RegistryError):
    """No bundle under that model name or digest."""


class AmbiguousDigest(RegistryError):
    """A shortened digest that more than one bundle starts with."""


class ChannelMoved(RegistryError):
    """The channel no longer points at what the caller saw: read it again and decide again."""


class ChannelNotFound(RegistryError):
    """The channel was never set."""


class RecordInvalid(RegistryError):
    """A record of the store is not JSON of the shape this version writes."""


class TargetExists(RegistryError):
    """The folder to pull into holds something that is not this bundle."""


class StoreFull(RegistryError):
    """The disk ran out of space; nothing was published, pulled or kept."""
