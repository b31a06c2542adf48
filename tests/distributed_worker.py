"""Run under torchrun by test_distributed.py: training runs and one loss, on every rank of a group.

Argument: a folder for the results with flags.json in it.
"""

import json
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
from test_distributed import ragged_inputs, record_gradients

import train
from loss import sea_loss

torch.set_num_threads(1)
out = Path(sys.argv[1])
flags = json.loads((out / "flags.json").read_text())


def run(name, stage, *extra):
    record_gradients(train, out / name)
    train.main([*flags[stage], "--out_dir", str(out / name), *extra])


run("local", "pretrain")
run("gathered", "pretrain", "--gather_pairs")

# The second rank comes late, as where loading is slow: the first must not have begun the run.
check = train.check_out_dir


def check_late(*args):
    time.sleep(3 * dist.get_rank())
    check(*args)


train.check_out_dir = check_late
run("pretrain_fsdp", "pretrain", "--fsdp", "--export")
train.check_out_dir = check

run("finetune", "finetune")
run("finetune_fsdp", "finetune", "--fsdp", "--save_every", "4")
run("bf16", "finetune", "--dtype", "bfloat16")
run("bf16_fsdp", "finetune", "--dtype", "bfloat16", "--fsdp")
run("pretrain_bf16_fsdp", "pretrain", "--dtype", "bfloat16", "--fsdp")
# as if it had been killed after the checkpoint of step 4
if dist.get_rank() == 0:
    shutil.copytree(out / "finetune_fsdp", out / "resumed")
dist.barrier()
run("resumed", "finetune", "--fsdp", "--resume")

rank = dist.get_rank()
try:
    train.check_out_dir(train.parse_config(["--out_dir", str(out / "new")]), {"data": rank})
except train.UserError as e:
    (out / f"differs_{rank}").write_text(str(e))
for case, (tokens, ids, scores, table, log_scale, counts) in ragged_inputs().items():
    rows = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    x, s = tokens[rows].clone().requires_grad_(), log_scale.clone().requires_grad_()
    generators = [torch.Generator().manual_seed(i) for i in range(len(ids))[rows]]
    loss, stats = sea_loss(
        x, ids[rows], scores[rows], table.__getitem__, s, (3, 3), 2, generators, gather=True
    )
    loss.backward()
    result = dict(loss=loss.detach(), x=x.grad, s=s.grad, pairs=stats["pairs"])
    torch.save(result, out / f"{case}_{rank}.pt")
dist.barrier()
dist.destroy_process_group()
