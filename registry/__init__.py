"""The registry: immutable bundles named by digest, channels that point at them, and the gate that guards both."""
