"""Run under torchrun by test_distributed.py: two training runs and one loss, on every rank of a gloo group.
Arguments: a folder for the results, then the flags of train.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
from test_distributed import ragged_inputs

import train
from loss import sea_loss

torch.set_num_threads(1)
out, flags = Path(sys.argv[1]), sys.argv[2:]
train.main([*flags, "--out_dir", str(out / "local")])
train.main([*flags, "--out_dir", str(out / "gathered"), "--gather_pairs"])

rank = dist.get_rank()
for case, (tokens, ids, scores, table, log_scale, counts) in ragged_inputs().items():
    rows = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    x, s = tokens[rows].clone().requires_grad_(), log_scale.clone().requires_grad_()
    generators = [torch.Generator().manual_seed(i) for i in range(len(ids))[rows]]
    loss, stats = sea_loss(x, ids[rows], scores[rows], table.__getitem__, s, (3, 3), 2, generators, gather=True)
    loss.backward()
    torch.save(dict(loss=loss.detach(), x=x.grad, s=s.grad, pairs=stats["pairs"]), out / f"{case}_{rank}.pt")
dist.barrier()
dist.destroy_process_group()
