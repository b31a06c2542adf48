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
from test_distributed import COLD, gathered_inputs, record_gradients

import loss as loss_module
import train
from loss import sea_loss

torch.set_num_threads(1)
out = Path(sys.argv[1])
flags = json.loads((out / "flags.json").read_text())


def run(name, stage, *extra):
    record_gradients(train, out / name)
    train.main([*flags[stage], "--out_dir", str(out / name), *extra])


run("local", "pretrain")

# The second rank comes late, as where loading is slow: the first must not have begun the run.
lock = train.lock_out_dir


def lock_late(*args):
    time.sleep(3 * dist.get_rank())
    return lock(*args)


train.lock_out_dir = lock_late
run("pretrain_fsdp", "pretrain", "--fsdp", "--export")
train.lock_out_dir = lock

# The first takes long to write the model, as where it is large: the second must not have left.
save = train.save_adapter


def save_slowly(*args):
    time.sleep(3)
    save(*args)


train.save_adapter = save_slowly
run("slowly", "pretrain", "--max_steps", "1")
train.save_adapter = save
is_there = (out / "slowly/model/adapter.safetensors").exists()
(out / f"slowly_{dist.get_rank()}").write_text(str(is_there))

run("finetune", "finetune")
run("finetune_fsdp", "finetune", "--fsdp", "--save_every", "4")
run("bf16", "finetune", "--dtype", "bfloat16")
run("bf16_fsdp", "finetune", "--dtype", "bfloat16", "--fsdp")
run("pretrain_bf16_fsdp", "pretrain", "--dtype", "bfloat16", "--fsdp")

# The pairs of each step: gathered, and with a low temperature that stays.
contrastive_loss = loss_module.contrastive_loss


def run_watched(name, *extra):
    pairs = []

    def watched(x, t, log_scale):
        pairs.append((x.detach(), t.detach()))
        return contrastive_loss(x, t, log_scale)

    loss_module.contrastive_loss = watched
    run(name, "pretrain", *extra)
    loss_module.contrastive_loss = contrastive_loss
    torch.save(pairs, out / f"{name}/pairs_{dist.get_rank()}.pt")


run_watched("gathered", "--gather_pairs")
run_watched("cold", *f"--tau {COLD} --lr 1e-15 --dtype bfloat16 --fsdp".split())

run("odd_pretrain_fsdp", "odd_pretrain", "--fsdp", "--export")
run("odd_finetune_fsdp", "odd_finetune", "--fsdp", "--save_every", "3")
# as if it had been killed after the checkpoint of step 4
if dist.get_rank() == 0:
    shutil.copytree(out / "finetune_fsdp", out / "resumed")
    shutil.copytree(out / "odd_finetune_fsdp", out / "odd_resumed")
    shutil.rmtree(out / "resumed/checkpoints/step_6")
    shutil.rmtree(out / "odd_resumed/model")
    shutil.rmtree(out / "odd_resumed/checkpoints/step_6")
dist.barrier()
run("resumed", "finetune", "--fsdp", "--resume")
run("odd_resumed", "odd_finetune", "--fsdp", "--resume")

rank = dist.get_rank()
try:
    train.refuse_differing_ranks({"data": rank})
except train.UserError as e:
    (out / f"differs_{rank}").write_text(str(e))
for case, (tokens, ids, table, log_scale) in gathered_inputs().items():
    rows = slice(2 * rank, 2 * rank + 2)
    x, s = tokens[rows].clone().requires_grad_(), log_scale.clone().requires_grad_()
    scores = torch.ones(2, 9, 1)
    loss, stats = sea_loss(
        x, ids[rows], scores, table.__getitem__, s, (3, 3), window=2, gather=True
    )
    loss.backward()
    result = dict(loss=loss.detach(), x=x.grad, s=s.grad, pairs=stats["pairs"])
    torch.save(result, out / f"{case}_{rank}.pt")
dist.barrier()
dist.destroy_process_group()
