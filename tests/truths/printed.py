"""What trainers print and export, line by line as they do, with a spike at record 200 of 300.

Each shape is a function of a record's loss and its number, counted from 0, that gives the text of
this record and of what the tool writes around it. fairseq's and nanochat's were compared with what
the tools print; the others are written down from experience with them.
"""

import json

import numpy as np

RECORDS, ONSET, EPOCH = 300, 200, 60


def losses() -> list[float]:
    """Return a falling loss with a spike of three steps."""
    noise = np.random.default_rng(5).standard_normal(RECORDS)
    loss = (2 + 7 * np.exp(-np.arange(RECORDS) / 30)) * (1 + 0.01 * noise)
    loss[ONSET : ONSET + 3] *= [1.5, 1.9, 1.4]
    return loss.tolist()


def ends_epoch(i: int) -> bool:
    return i % EPOCH == EPOCH - 1


def nanochat(x: float, i: int) -> str:
    """nanochat, base_train."""
    other = f"Step {i:05d} | Validation bpb: {x / 3:.6f}\n" if not i % 50 else ""
    return other + (
        f"step {i:05d}/{RECORDS:05d} ({100 * i / RECORDS:.2f}%) | loss: {x:.6f} | lrm: 1.00 | "
        f"dt: 1234.56ms | tok/sec: 123,456 | bf16_mfu: 45.67 | epoch: 1 | total time: 0.12m | "
        "eta: 5.0m"
    )


def nanochat_sft(x: float, i: int) -> str:
    """nanochat, chat_sft of 2025."""
    other = f"Step {i:05d} | Validation loss: {x + 3:.6f}\n" if not i % 50 else ""
    return other + (
        f"Step {i:05d}/{RECORDS:05d} | Training loss: {x:.6f}| lrm: 1.000000| num_tokens: 1,234"
    )


def modded_nanogpt(x: float, i: int) -> str:
    """modded-nanogpt."""
    other = f"step:{i}/{RECORDS} val_loss:{x + 2:.4f} train_time:99ms\n" if not i % 50 else ""
    return f"{other}step:{i}/{RECORDS} train_loss:{x:.4f} train_time:1234ms step_avg:12.34ms"


def llmc_old(x: float, i: int) -> str:
    """llm.c of early 2024."""
    other = f"val loss {x + 2:.6f}\n" if not i % 50 else ""
    return other + f"step {i}/{RECORDS}: train loss {x:.6f} (acc {x:.6f}) (22.1 ms, 1600000 tok/s)"


def llmc_main_log(x: float, i: int) -> str:
    """llm.c's main.log."""
    other = f"s:{i} tel:{x + 2:.4f}\n" if not i % 50 else ""
    return f"{other}s:{i} trl:{x:.4f} lr:0.000600 norm:{x / 4:.2f}"


def megatron_validates(x: float, i: int) -> str:
    """Megatron-LM of 2025, with a validation between."""
    bar = "-" * 100
    other = (
        f"{bar}\n validation loss at iteration {i} | lm loss value: {x + 4:.6E} | lm loss PPL: "
        f"{9.1:.6E} |\n{bar}\n"
    )
    return (other if i and not i % 50 else "") + (
        f" [2025-03-01 10:00:00.123456] iteration {i:8d}/{RECORDS:8d} | consumed samples: "
        f"{256 * i:12d} | elapsed time per iteration (ms): 812.3 | throughput per GPU "
        "(TFLOP/s/GPU): 401.2 | learning rate: 1.000000E-04 | global batch size:   256 | "
        f"lm loss: {x:.6E} | load_balancing_loss: 1.012345E+00 | loss scale: 1.0 | grad norm: "
        f"{x / 4:.3f} | num zeros: 0 | params norm: 99.1 | number of skipped iterations:   0 | "
        "number of nan iterations:   0 |"
    )


def nemo(x: float, i: int) -> str:
    """NeMo 2 with its progress printer."""
    return (
        f"Training epoch {i // EPOCH}, iteration {i % EPOCH}/{EPOCH - 1} | lr: 1.499e-07 | "
        f"global_batch_size: 8 | global_step: {i} | reduced_train_loss: {x:.4g} | "
        f"train_step_timing in s: 5.123 | consumed_samples: {8 * i}"
    )


def deepspeed(x: float, i: int) -> str:
    """DeepSpeed's pipeline engine."""
    return (
        f"[2024-03-01 10:00:00,123] [INFO] [logging.py:96:log_dist] [Rank 0] step={i}, skipped=0, "
        "lr=[0.0001], mom=[(0.9, 0.95)]\n"
        f"steps: {i} loss: {x:.4f} iter time (s): 1.234 samples/sec: 103.745"
    )


def torchtitan_plain(x: float, i: int) -> str:
    """torchtitan without colours, with validation."""
    head = "[rank0]:[titan] 2025-06-23 13:13:00,153 - root - INFO - "
    other = f"{head}validate step: {i:2}  loss: {x + 3:8.5f}  memory:  0.51GiB(0.54%)  tps: 9,234\n"
    return (other if i and not i % 50 else "") + (
        f"{head}step: {i:2}  loss: {x:8.5f}  grad_norm: {x / 4:7.4f}  memory:  0.51GiB(0.54%)  "
        "tps: 21,234  tflops: 0.32  mfu: 0.03%"
    )


def trl(x: float, i: int) -> str:
    """TRL's SFTTrainer and Axolotl, with an evaluation between, on a Trainer's console."""
    other = {"eval_loss": x + 2, "eval_runtime": 1.2, "eval_num_tokens": 1e4, "epoch": i / EPOCH}
    one = {"loss": f"{x:.4g}", "grad_norm": f"{x / 4:.4g}", "learning_rate": "2e-05",
           "entropy": "1.234", "num_tokens": "12345.0", "mean_token_accuracy": "0.61",
           "memory/max_active (GiB)": "12.3", "epoch": f"{i / EPOCH:.2f}"}  # fmt: skip
    return (f"{other}\n" if i % 50 == 49 else "") + str(one)


def trainer_with_bar(x: float, i: int) -> str:
    """Hugging Face's Trainer with tqdm on the same stream, and the summary at the end."""
    bar = f"\r{i // 3:3d}%|{'#' * 4:10}| {i}/{RECORDS} [00:01<00:09,  1.20it/s]"
    cells = {"loss": x, "grad_norm": x / 4, "learning_rate": 1e-4, "epoch": i / EPOCH}
    end = "\n{'train_runtime': 99.1, 'train_loss': 2.9, 'epoch': 5.0}" if i == RECORDS - 1 else ""
    return f"{bar}\r{' ' * 20}\r{cells}\n{bar}{end}"


def tqdm_postfix(x: float, i: int) -> str:
    """tqdm with a postfix: one line on which it writes over itself."""
    bar = f"\rtraining:  {i // 3}%|{'█' * (i // 30):10}| {i}/{RECORDS} [00:10<00:20,  9.90it/s"
    return f"{bar}, loss={x:.4f}]"


def tqdm_of_epochs(x: float, i: int) -> str:
    """tqdm, a bar an epoch, with a bar of validation that has a loss."""
    n = i % EPOCH
    bar = f"\rEpoch {i // EPOCH + 1}/5:  {n}%|██   | {n}/{EPOCH} [00:10<00:20, loss={x:.4f}]"
    other = f"\n\rValidation:  50%|██   | 5/10 [00:01<00:01,  9.9it/s, loss={x + 3:.4f}]\n"
    return bar + (other if ends_epoch(i) else "")


def tqdm_description(x: float, i: int) -> str:
    """tqdm whose description has the loss."""
    return f"\rstep {i} loss {x:.4f}:  {i // 3}%|██   | {i}/{RECORDS} [00:10<00:20,  9.90it/s]"


def lightning_bar(x: float, i: int) -> str:
    """Lightning's tqdm bar, with the last validation's loss from the second epoch on."""
    n = i % EPOCH
    more = f", val_loss={x + 1:.3f}, train_loss_epoch={x:.3f}" if i >= EPOCH else ""
    return (
        f"\rEpoch {i // EPOCH}:  {n}%|██   | {n}/{EPOCH} [00:01<00:10,  9.50it/s, v_num=0, "
        f"train_loss_step={x:.4f}{more}]"
    )


def mmengine(x: float, i: int) -> str:
    """mmengine by epoch."""
    epoch, n = i // EPOCH + 1, 50 * (i % EPOCH + 1)
    other = (
        f"08/21 02:59:41 - mmengine - INFO - Epoch(val) [{epoch}][50/50]    coco/bbox_mAP: 0.1\n"
    )
    return (
        f"08/21 02:58:41 - mmengine - INFO - Epoch(train) [{epoch}][{n:4d}/3000]  lr: 1.0000e-02  "
        f"eta: 0:01:00  time: 0.0019  data_time: 0.0004  grad_norm: {x / 4:.4f}  loss_cls: "
        f"{x / 2:.4f}  loss_bbox: {x / 2:.4f}  loss: {x:.4f}"
    ) + ("\n" + other.rstrip() if ends_epoch(i) else "")


def mmcv(x: float, i: int) -> str:
    """mmcv's runner, with a validation workflow that has a loss."""
    epoch, n = i // EPOCH + 1, 50 * (i % EPOCH + 1)
    head = "2021-03-04 10:00:00,123 - mmdet - INFO - "
    other = f"\n{head}Epoch(val) [{epoch}][50]\tloss: {x + 3:.4f}" if ends_epoch(i) else ""
    return (
        f"{head}Epoch [{epoch}][{n}/3000]\tlr: 1.978e-03, eta: 12:34:56, time: 0.456, data_time: "
        f"0.050, memory: 2837, loss_rpn_cls: {x / 2:.4f}, loss_bbox: {x / 2:.4f}, loss: {x:.4f}, "
        f"grad_norm: {x / 4:.4f}{other}"
    )


def mmcv_by_iteration(x: float, i: int) -> str:
    """mmcv's iteration runner."""
    return (
        f"2021-03-04 10:00:00,123 - mmseg - INFO - Iter [{50 * (i + 1)}/80000]\tlr: 1e-02, eta: "
        f"1:00:00, time: 0.456, decode.loss_ce: {x / 2:.4f}, decode.acc_seg: 61.2, loss: {x:.4f}"
    )


def fairseq_json(x: float, i: int) -> str:
    """fairseq, --log-format json: updates, a sum of each epoch, a validation."""
    head = "2021-03-08 12:29:51 | INFO | "
    one = {"epoch": i // EPOCH + 1, "update": i / EPOCH, "loss": f"{x:.3f}", "nll_loss":
           f"{x - 1:.3f}", "ppl": "91120.8", "num_updates": str(i + 1), "lr": "2e-05", "gnorm":
           f"{x / 4:.3f}", "loss_scale": "4", "wall": "105"}  # fmt: skip
    lines = [f"{head}train_inner | {json.dumps(one)}"]
    if ends_epoch(i):
        valid = {"epoch": 1, "valid_loss": f"{x + 2:.3f}", "valid_num_updates": str(i + 1)}
        total = {"epoch": 1, "train_loss": f"{x + 1:.3f}", "train_num_updates": str(i + 1)}
        lines += [f"{head}valid | {json.dumps(valid)}", f"{head}train | {json.dumps(total)}"]
    return "\n".join(lines)


def fairseq_simple(x: float, i: int) -> str:
    """fairseq, --log-format simple."""
    head = "2021-03-08 12:29:51 | INFO | "
    epoch = i // EPOCH + 1
    lines = [
        f"{head}train_inner | epoch {epoch:03d}:  {i % EPOCH + 1:5d} / {EPOCH} loss={x:.3f}, "
        f"nll_loss={x - 1:.3f}, ppl=9112.8, wps=288.7, num_updates={i + 1}, lr=2e-05, "
        f"gnorm={x / 4:.3f}, train_wall=57, wall=161"
    ]
    if ends_epoch(i):
        lines += [
            f"{head}valid | epoch {epoch:03d} | valid on 'valid' subset | loss {x + 2:.3f} | "
            f"nll_loss {x + 1:.3f} | num_updates {i + 1}",
            f"{head}train | epoch {epoch:03d} | loss {x + 1:.3f} | nll_loss {x:.3f} | "
            f"num_updates {i + 1} | lr 2e-05 | gnorm 1.1",
        ]
    return "\n".join(lines)


def olmo(x: float, i: int) -> str:
    """OLMo: a block of lines for each step."""
    return (
        f"2024-05-01T10:00:00.123456789Z 2024-05-01 10:00:00.123\thost:0\tolmo.train:930\tINFO\t"
        f"[step={i}/739328,epoch=0]\n    optim/total_grad_norm={x / 4:.4f}\n"
        f"    train/CrossEntropyLoss={x:.3f}\n    train/Perplexity=1,234\n"
        "    throughput/total_tokens=4,194,304\n    throughput/device/batches_per_second=0.1"
    )


def olmo_core(x: float, i: int) -> str:
    """OLMo-core: a block of lines for each step, names with blanks and brackets."""
    return (
        f"2024-12-01 10:00:00\thost:0\tolmo_core.train.callbacks.console_logger:65\tINFO\t"
        f"[step={i}/10000,epoch=1,eta=1h]\n    optim/LR (group 0)=0.0003\n"
        f"    optim/total grad norm={x / 4:.4f}\n    train/CE loss={x:.3f}\n"
        "    train/PPL=12.3\n    train/Z loss=0.0012"
    )


def litgpt(x: float, i: int) -> str:
    """LitGPT's pretraining."""
    other = f"iter {4 * i}: val loss {x + 3:.4f}, val time: 123.45 ms\n" if not i % 50 else ""
    return other + (
        f"Epoch 1 | iter {4 * (i + 1)} step {i + 1} | loss train: {x:.3f}, val: n/a | iter time: "
        "123.45 ms (step) remaining time: 0:01:02"
    )


def lit_gpt(x: float, i: int) -> str:
    """Lit-GPT of 2023."""
    other = f"step {i}: val loss {x + 3:.4f}, val time: 12.34ms\n" if not i % 50 else ""
    return f"{other}iter {i} step {i}: loss {x:.4f}, iter time: 123.45ms (optimizer.step)"


def torchvision(x: float, i: int) -> str:
    """torchvision's references."""
    n = i % EPOCH
    other = f"\nTest:  [ 0/10]  eta: 0:00:09  loss: {x + 3:.4f} ({x + 3:.4f})  acc1: 9.1 (9.1)"
    return (
        f"Epoch: [{i // EPOCH}]  [{n:5d}/{EPOCH}]  eta: 0:12:34  lr: 0.1  img/s: 123.4  loss: "
        f"{x:.4f} ({x + 1:.4f})  acc1: 0.0 (0.1)  time: 0.5  data: 0.1  max mem: 1234"
    ) + (other if ends_epoch(i) else "")


def imagenet(x: float, i: int) -> str:
    """PyTorch's example of ImageNet."""
    n = i % EPOCH
    other = f"\nTest: [ 0/98]\tTime  3.1 ( 3.1)\tLoss {x + 3:.4e} ({x + 3:.4e})\tAcc@1  9.1 ( 9.1)"
    return (
        f"Epoch: [{i // EPOCH}][{n:4d}/{EPOCH}]\tTime  0.512 ( 0.812)\tData  0.011 ( 0.102)\t"
        f"Loss {x:.4e} ({x + 1:.4e})\tAcc@1   0.00 (  0.11)"
    ) + (other if ends_epoch(i) else "")


def timm(x: float, i: int) -> str:
    """timm's train script."""
    n = i % EPOCH
    other = f"\nTest: [   0/48]  Time: 0.5 (0.5)  Loss:  {x + 3:>7.4f} ({x + 3:>6.4f})"
    return (
        f"Train: {i // EPOCH} [{n:>4d}/{EPOCH} ({n:>3.0f}%)]  Loss: {x:>7.3f} ({x:.3f})  "
        "Time: 0.345s, 741.2/s  LR: 1.000e-06  Data: 0.011 (0.01)"
    ) + (other if ends_epoch(i) else "")


def mnist(x: float, i: int) -> str:
    """PyTorch's example of MNIST."""
    n = i % EPOCH
    other = "\n\nTest set: Average loss: 9.0500, Accuracy: 9800/10000 (98%)\n"
    return (f"Train Epoch: {i // EPOCH + 1} [{640 * n}/60000 ({n}%)]\tLoss: {x:.6f}") + (
        other if ends_epoch(i) else ""
    )


def cifar(x: float, i: int) -> str:
    """PyTorch's tutorial of CIFAR."""
    return f"[{i // EPOCH + 1}, {2000 * (i % EPOCH + 1):5d}] loss: {x:.3f}"


def tutorial(x: float, i: int) -> str:
    """The commonest line of tutorials."""
    return f"Epoch [{i // EPOCH + 1}/5], Step [{i % EPOCH + 1}/{EPOCH}], Loss: {x:.4f}"


def headed(x: float, i: int) -> str:
    """Epochs on lines of their own."""
    n = i % EPOCH
    return (f"Epoch {i // EPOCH + 1}/5\n" if not n else "") + f"batch {n}: loss = {x:.4f}"


def keras_bar(x: float, i: int) -> str:
    """Keras' progress bar, written over itself, with a line of both losses at an epoch's end."""
    n = i % EPOCH + 1
    head = f"Epoch {i // EPOCH + 1}/5\n" if n == 1 else ""
    end = f"\b\b\b\r{n}/{EPOCH} [======] - 3s 1ms/step - loss: {x:.4f} - val_loss: {x + 1:.4f}\n"
    return head + f"\r {n}/{EPOCH} [==>...] - ETA: 1:23 - loss: {x:.4f} - accuracy: 0.1" + (
        end if ends_epoch(i) else "")  # fmt: skip


def tensors(x: float, i: int) -> str:
    """A tensor that was printed as it is."""
    return f"step {i}: loss=tensor({x:.4f}, device='cuda:0', grad_fn=<NllLossBackward0>)"


def loguru(x: float, i: int) -> str:
    """loguru with the place in the source."""
    return f"2024-03-01 10:00:00.123 | INFO     | __main__:train:88 - step={i} loss={x:.4f} lr=1e-4"


def epochs_only(x: float, i: int) -> str:
    """One line an epoch, with both losses."""
    return f"Epoch {i}: train_loss={x:.4f}, val_loss={x + 1:.4f}, time per epoch: 0.5"


def composer(x: float, i: int) -> str:
    """Composer: a block of lines for each batch, and one for an evaluation."""
    other = "\n[Eval batch=1/10] Eval on eval data:\n\t Eval metrics/eval/CrossEntropy: 9.1"
    return (
        f"[batch={i}/4800]:\n\t Train time/batch: {i}\n\t Train loss/train/total: {x:.4f}\n"
        f"\t Train metrics/train/CrossEntropy: {x:.4f}\n\t Train throughput/batches_per_sec: 1.2"
    ) + (other if ends_epoch(i) else "")


def estimator(x: float, i: int) -> str:
    """TensorFlow's Estimator."""
    other = f"\nINFO:tensorflow:Saving dict for global step {i}: global_step = {i}, loss = 9.4"
    return f"INFO:tensorflow:loss = {x:.6f}, step = {i} (1.234 sec)" + (
        other if ends_epoch(i) else "")  # fmt: skip


def maxtext(x: float, i: int) -> str:
    """MaxText."""
    return (
        f"completed step: {i}, seconds: 1.234, TFLOP/s/device: 123.4, Tokens/s/device: 1234.5, "
        f"total_weights: 8192, loss: {x:.3f}"
    )


def detectron2(x: float, i: int) -> str:
    """Detectron2."""
    return (
        f"[03/01 10:00:00 d2.utils.events]:  eta: 1:00:00  iter: {i}  total_loss: {x:.4f}  "
        "loss_cls: 0.9  loss_box_reg: 0.5  time: 0.1  lr: 1e-4  max_mem: 1234M"
    )


def sentence(x: float, i: int) -> str:
    """A loss at a step, in which the number behind the loss's name is the step."""
    other = f"\nValidation loss at iteration {i}: 9.0" if ends_epoch(i) else ""
    return f"Training loss at iteration {i}: {x:.4f}{other}"


def parts(x: float, i: int) -> str:
    """A mode between bars, after a first pair."""
    other = f"\nEpoch 0 | step {i} | val | loss 9.0" if ends_epoch(i) else ""
    return f"Epoch 0 | step {i} | train | loss {x:.4f}{other}"


def lightning_rich(x: float, i: int) -> str:
    """Lightning's rich bar."""
    return (
        f"Epoch {i // EPOCH}/4 ━━━━━━━━━━━━━━ {i % EPOCH}/{EPOCH} 0:00:01 • 0:00:09 9.5it/s "
        f"v_num: 0 train_loss: {x:.3f}"
    )


def below_heading(x: float, i: int) -> str:
    """An evaluation that prints like a step, below a heading."""
    other = f"\n*** Evaluation ***\n  step {i} loss 9.0" if ends_epoch(i) else ""
    return f"step {i} loss {x:.4f}{other}"
