"""Every way the registry says no.

RegistryError
├── ManifestInvalid     the manifest is not one we can read
├── SignatureMissing    a bundle nobody signed where a public key is configured
├── SignatureInvalid    a signature that no configured key made
├── BundleTooLarge      a bundle over the limit
├── DigestMismatch      a file, manifest or bundle is not the one its digest names
├── BundleIncomplete    a file the manifest lists is not there
├── ReferenceInvalid    a model, channel or digest spelled in a way that can name nothing
├── BundleNotFound      nothing under that name or digest
├── AmbiguousDigest     a short digest that fits several bundles
├── ChannelMoved        somebody moved the channel first
├── ChannelNotFound     the channel has never been set
├── RecordInvalid       a record in the store is not one we can read
├── TargetExists        something else lies where the bundle should go
├── SettingsInvalid     a setting of the registry that cannot be read or is out of range
├── StoreFull           the disk has no room
├── StoreUnavailable    the S3 server does not answer, or refuses us
├── LedgerBroken        the ledger is not the chain that was written
└── PromotionRefused    a bundle may not be promoted, or a channel not rolled back
    ├── GateFailed          the gate said no
    ├── ApprovalMissing     not enough people said yes
    ├── ApprovalExpired     a yes that came too long ago
    ├── ApprovalMismatch    a yes to another bundle or another gate report
    ├── ApprovalRejected    somebody said no
    ├── ApproverUnknown     a yes from somebody who may not approve
    ├── ApproverIsRequester a yes from who started the run
    ├── OverrideRequired    a caution that nobody overrode with a reason
    ├── PolicyUnknown       an automatic yes by a policy that is not configured
    └── RollbackRefused     nothing to go back to, or a bundle that was never there
"""


class RegistryError(Exception):
    """Base of all registry errors; the message names the value and the limit."""


class ManifestInvalid(RegistryError):
    """The manifest is missing, is not JSON, has unknown keys or a value out of range."""


class SignatureMissing(RegistryError):
    """A public key is configured and the bundle is not signed."""


class SignatureInvalid(RegistryError):
    """The signature was made by none of the configured keys, or over another manifest; or a key file is none."""


class BundleTooLarge(RegistryError):
    """The bundle's files are larger, all together, than the limit."""


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


class SettingsInvalid(RegistryError):
    """A key of `[registry]`, or its variable, is unknown or out of range; or the settings file cannot be read."""


class StoreFull(RegistryError):
    """The disk ran out of space; nothing was published, pulled or kept."""


class StoreUnavailable(RegistryError):
    """The S3 server cannot be reached, keeps failing, or refuses with a reason of its own."""


class LedgerBroken(RegistryError):
    """An entry of the ledger is missing, was changed or does not follow from the one before."""


class PromotionRefused(RegistryError):
    """Base of the reasons for which a channel is not moved; each is recorded in the ledger."""


class GateFailed(PromotionRefused):
    """The gate's verdict is fail, which no approval outweighs."""


class ApprovalMissing(PromotionRefused):
    """Fewer different people approved than the configuration requires."""


class ApprovalExpired(PromotionRefused):
    """An approval is older than it may be, or dated in the future."""


class ApprovalMismatch(PromotionRefused):
    """An approval names another bundle or another gate report than the one to promote."""


class ApprovalRejected(PromotionRefused):
    """One of the people asked said no."""


class ApproverUnknown(PromotionRefused):
    """An approval by somebody who is not on the configuration's list."""


class ApproverIsRequester(PromotionRefused):
    """An approval by the person who started the run, where the configuration does not let them."""


class OverrideRequired(PromotionRefused):
    """The gate says caution, which takes an override that gives its reason."""


class PolicyUnknown(PromotionRefused):
    """An automatic approval by a policy other than the configured one."""


class RollbackRefused(PromotionRefused):
    """The channel never held the bundle to go back to, or there is nothing it replaced."""
