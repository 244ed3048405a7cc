"""What one rank does in the test of several ranks' frames: `python sync_norm_ranks.py OUT`. Writes OUT/<rank>.json."""

import json
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from train.launch import join_world
from train.loop import weighted_backward
from train.models.cnn_rnn import build_cnn_rnn

OPTIONS = {"img_size": [5, 4, 6, 3], "channels": [4, 6], "norm_groups": 2, "hidden": 5}
# What the ranks do, and what one process does that should be the same.
VARIANTS = {
    "sync_batch": ({"norm": "sync_batch"}, {"norm": "batch"}),
    "sync_batch in chunks": ({"norm": "sync_batch", "checkpointing": True, "frame_chunk": 3}, {"norm": "batch"}),
    "group": ({"checkpointing": True, "frame_chunk": 2}, {"frame_chunk": 0}),
}
LENGTHS = torch.tensor([3, 1, 2, 3, 3])
SHARES = (slice(0, 2), slice(2, 5))


def network(options):
    torch.manual_seed(1)
    return build_cnn_rnn(OPTIONS | options)


def batch():
    """Five windows, of which the first rank takes two, with 4 of the 12 true frames."""
    generator = torch.Generator().manual_seed(3)
    # Far from zero: what loses digits of a variance would show.
    bold = 30 + torch.randn(5, 1, 5, 4, 6, 3, generator=generator)
    return bold, torch.randn(5, generator=generator)


def step(model, running, rows, world):
    """Outputs of some of the windows, gradients of all windows' mean loss, and the running statistics after it."""
    bold, targets = batch()
    outputs = running(bold[rows], lengths=LENGTHS[rows]).squeeze(1)
    losses = F.smooth_l1_loss(outputs, targets[rows], reduction="none")
    weighted_backward(losses, global_size=5, world=world)
    buffers = [buffer.flatten().double() for buffer in model.buffers()]
    return {
        "outputs": outputs.tolist(),
        "gradient": torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).tolist(),
        "statistics": torch.cat([*buffers, torch.zeros(0)]).tolist(),
        "evaluated": model.eval()(bold[rows], lengths=LENGTHS[rows]).squeeze(1).tolist(),
    }


def main() -> None:
    with join_world(timeout_s=60) as world:
        found = {}
        for name, (options, _) in VARIANTS.items():
            model = network(options)
            running = nn.parallel.DistributedDataParallel(model)
            found[name] = step(model, running, SHARES[world.rank], world)
        (Path(sys.argv[1]) / f"{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
