"""Labels that neighbouring action bins share."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training.smoothing import SmoothedLoss, smoothed_nll


@given(st.integers(0, 255), st.floats(0.5, 20.0))
def test_the_best_prediction_is_the_gaussian(right, width):
    """No prediction has a lower loss than the Gaussian itself, and its largest bin is the right one."""
    offsets = torch.arange(256) - right
    gaussian = torch.softmax(-0.5 * (offsets / width) ** 2, dim=0).clamp(min=1e-30).log()[None]
    bins = torch.tensor([right])
    best = smoothed_nll(gaussian, bins, width)
    assert gaussian.argmax() == right
    for other in (torch.zeros(1, 256), gaussian.roll(3, 1), 2 * gaussian):
        assert best <= smoothed_nll(other.log_softmax(-1), bins, width) + 1e-4


def test_no_width_is_cross_entropy():
    logits, bins = torch.randn(5, 7, 256), torch.randint(256, (5, 7))
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), bins, reduction="none")
    torch.testing.assert_close(smoothed_nll(logits.log_softmax(-1), bins, 0.0), expected)


def test_a_repeated_action_does_not_hide_the_others():
    """Three in ten at one bin, seven in ten spread around another: the best prediction is near the latter."""
    bins = torch.cat([torch.full((30,), 128), torch.arange(200, 235).repeat(2)])
    for width, expected in ((0.0, range(128, 129)), (8.0, range(205, 230))):
        logits = torch.zeros(256, requires_grad=True)
        optimizer = torch.optim.Adam([logits], 0.1)
        for _ in range(300):
            optimizer.zero_grad()
            smoothed_nll(logits.log_softmax(-1).expand(len(bins), -1), bins, width).mean().backward()
            optimizer.step()
        assert logits.argmax().item() in expected


@pytest.mark.parametrize("count", [None, 20])
def test_loss_of_a_policy(policy, count):
    """Action tokens are smoothed among themselves, the stop token is not; what is not supervised does not count."""
    model, processor = policy
    begin, stop = model.config.action_token_begin, processor.tokenizer.eos_token_id
    labels = torch.tensor([[-100, begin + 3, begin + 200, stop], [-100, -100, begin, stop]])
    logits = torch.randn(2, 4, model.config.text_config.vocab_size)
    found = SmoothedLoss(model.codec, 4.0)(
        logits=logits, labels=None, vocab_size=logits.shape[-1], num_items_in_batch=count, shift_labels=labels
    )
    total = 0.0
    for row, column in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3)):
        log_probabilities, target = logits[row, column].log_softmax(-1), labels[row, column]
        if target == stop:
            total -= log_probabilities[stop]
            continue
        weights = torch.exp(-0.5 * ((torch.arange(begin, begin + 256) - target) / 4.0) ** 2)
        total -= (weights / weights.sum() * log_probabilities[begin : begin + 256]).sum()
    torch.testing.assert_close(found, total / (count or 5))
