"""A window finds its partner among the windows of other subjects; ranks together are tested in test_launch.py."""

import math

import pytest
import torch
from torch.nn import functional as F

from train.contrastive import nt_xent, nt_xent_alone
from train.models.heads import nt_xent as swift_nt_xent


def unit(*degrees):
    angles = torch.tensor(degrees) * math.pi / 180
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_two_pairs_give_the_loss_worked_out_by_hand():
    # Windows at 0 and 60 degrees of one subject, 90 and 180 of another: cosines .5; 0, -1; .866, -.5; and 0.
    embeddings = 3 * unit(0, 60, 90, 180).view(2, 2, 2)
    root = math.sqrt(3) / 2

    def loss(partner, *others):
        return -partner / 0.5 + math.log(sum(math.exp(cosine / 0.5) for cosine in (partner, *others)))

    first = (loss(0.5, 0, -1) + loss(0.5, root, -0.5)) / 2
    second = (loss(0, 0, root) + loss(0, -1, -0.5)) / 2
    torch.testing.assert_close(nt_xent(embeddings, torch.tensor([4, 7]), 0.5), torch.tensor([first, second]))


def test_with_every_subject_once_it_is_the_published_loss():
    embeddings = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(0))
    ours = nt_xent(embeddings, torch.arange(5), 0.1).mean()
    torch.testing.assert_close(ours, swift_nt_xent(embeddings[:, 0], embeddings[:, 1], temperature=0.1))


def test_another_pair_of_the_same_subject_is_no_negative():
    generator = torch.Generator().manual_seed(1)
    embeddings, subjects = torch.randn(4, 2, 8, generator=generator), torch.tensor([3, 8, 3, 5])
    losses = nt_xent(embeddings, subjects, 0.2)
    without = nt_xent(embeddings[[0, 1, 3]], subjects[[0, 1, 3]], 0.2)
    torch.testing.assert_close(losses[0], without[0])
    assert losses[1] > without[1]  # for others they are two pairs


def test_one_subject_alone_teaches_nothing():
    embeddings = torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(2)).requires_grad_()
    losses = nt_xent(embeddings, torch.tensor([1, 1]))
    losses.sum().backward()
    assert losses.tolist() == [0, 0]
    assert not embeddings.grad.any()


def test_half_precision_embeddings_are_compared_in_float32():
    embeddings = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(3)).bfloat16()
    losses = nt_xent(embeddings, torch.arange(3))
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, nt_xent(embeddings.float(), torch.arange(3)))


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_only_the_direction_of_an_embedding_counts(scale):
    embeddings = F.normalize(torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(4)), dim=2)
    torch.testing.assert_close(nt_xent(scale * embeddings, torch.arange(3)), nt_xent(embeddings, torch.arange(3)))


def test_alone_it_is_the_same_loss():
    torch.manual_seed(0)
    embeddings, subjects = torch.randn(5, 2, 4), torch.tensor([1, 2, 1, 3, 4])
    assert torch.equal(nt_xent_alone(embeddings, subjects, 0.3), nt_xent(embeddings, subjects, 0.3))
