"""The verifier's processor: what makes model inputs and placeholder tokens of images."""

from transformers import AutoProcessor, ProcessorMixin

from ...conf.schema import VerifierConfig
from .config import from_checkpoint


def load_processor(config: VerifierConfig) -> ProcessorMixin:
    """Load the processor of a verifier that reads images; raise ValueError if it or a package for it is not there."""
    try:
        processor = from_checkpoint(config, AutoProcessor)
    except ValueError as error:
        reason = " ".join(str(error.__cause__).split())
        if "trust_remote_code" in reason:
            raise
        if "torchvision" in reason:
            raise ValueError(
                f"verifier.path {config.path!r} reads images by a processor that needs torchvision: "
                "pip install 'fledge-eagle[images]'"
            ) from None
        raise _no_processor(config, reason[:200]) from None
    if not isinstance(processor, ProcessorMixin) or not hasattr(processor, "image_processor"):
        raise _no_processor(config, f"transformers makes a {type(processor).__name__} of it")
    return processor


def _no_processor(config: VerifierConfig, reason: str) -> ValueError:
    return ValueError(
        f"verifier.path {config.path!r} reads images and has no processor for them (preprocessor_config.json or "
        f"processor_config.json): save the one it was trained with beside its weights ({reason})"
    )
