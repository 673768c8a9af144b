"""Whether answers are the verifier's own words: by how likely it finds them."""

from ...conf.schema import VerifierConfig
from ...models.verifier.config import load_config, logit_transform
from ...models.verifier.weights import VerifierWeights
from ..store.index import spread
from ..store.store import HiddenStateStore

_SAMPLES = 64  # from all over the training split
_TOKENS = 64  # of each
_FEWEST = 16  # tokens: of fewer the sum is not normal enough
_SIGMAS = 4.0
_LEAST = 0.1  # temperature: at 0 rounding alone may take another token


def foreign_samples(store: HiddenStateStore, verifier: VerifierConfig, temperature: float) -> tuple[list[str], int]:
    """Return which training samples the verifier would hardly have written at a temperature, and how many it looked at.

    The surprise of a token that is drawn from a distribution, less the distribution's entropy, has mean 0 and the
    variance of log p. A sample is foreign if the sum over its tokens is above 0 by four standard deviations. At
    temperature 1 few texts are: a verifier knows what others write. The lower the temperature, the more it tells;
    answers drawn at a higher one than was said are foreign, too.
    """
    train = [number for number, name in enumerate(store.ids) if name not in store.heldout_ids]
    lm_head, transform = VerifierWeights(verifier).lm_head().float(), logit_transform(load_config(verifier))
    foreign, looked = list[str](), 0
    for place in spread(len(train), _SAMPLES):
        sample = store[train[place]].decoded()
        mask = sample.loss_mask.bool()
        rows = (mask[:-1] & mask[1:]).nonzero().squeeze(1)[:_TOKENS]  # states inside an answer, which all stores keep
        assert sample.last_hidden_state is not None
        states = sample.last_hidden_state[rows].float()
        if len(rows) < _FEWEST or not states.isfinite().all():
            continue
        log_p = (transform.apply_(states @ lm_head.T) / max(temperature, _LEAST)).log_softmax(-1)
        p = log_p.exp()
        entropy = -(p * log_p).sum(-1)
        variance = (p * log_p.square()).sum(-1) - entropy.square()
        surprise = -log_p.gather(1, sample.input_ids[rows + 1].long()[:, None]).squeeze(1)
        looked += 1
        if (surprise - entropy).sum() > _SIGMAS * variance.sum().clamp(min=1e-4).sqrt():
            foreign.append(sample.id)
    return foreign, looked
