"""What a user of another trainer types for a key of dtrain, and keys that are often typed without their section.

It is for messages alone: no such name is taken. The table for people is in docs/coming-from.md.
"""

from __future__ import annotations

from collections.abc import Mapping

_WORKED_OUT = "worked out of batch.global_batch, batch.micro_batch and the ranks"

NAMES: Mapping[str, str] = {
    # how long, and how much at a time
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "max_steps": "train.steps",
    "num_steps": "train.steps",
    "batch_size": "batch.global_batch or batch.micro_batch",
    "train_batch_size": "batch.global_batch",
    "global_batch_size": "batch.global_batch",
    "micro_batch_size": "batch.micro_batch",
    "local_batch_size": "batch.micro_batch",
    "per_device_train_batch_size": "batch.micro_batch",
    "gradient_accumulation_steps": _WORKED_OUT,
    "grad_accum": _WORKED_OUT,
    "accumulate": _WORKED_OUT,
    # the update
    "lr": "optim.lr",
    "learning_rate": "optim.lr",
    "weight_decay": "optim.weight_decay",
    "betas": "optim.betas",
    "optimizer": "optim",
    "lr_scheduler": "schedule",
    "lr_scheduler_type": "schedule",
    "warmup_steps": "schedule.warmup_steps",
    "warmup_ratio": "schedule.warmup_steps, a number of steps",
    "max_grad_norm": "train.grad_clip",
    "gradient_clipping": "train.grad_clip",
    "max_norm": "train.grad_clip",
    "bf16": "train.precision=bf16",
    "fp16": "train.precision=fp16",
    "mixed_precision": "train.precision",
    "gradient_checkpointing": "train.activation_checkpointing",
    # model and tuning
    "path": "dataset.path or model.path",
    "model_name_or_path": "model.path with model=hf",
    "base_model": "model.path with model=hf",
    "model_path": "model.path with model=hf",
    "flash_attn": "model.attention",
    "attn_implementation": "model.attention",
    "finetuning_type": "tuning",
    "adapter": "tuning",
    "peft": "tuning",
    "lora": "tuning=lora",
    "lora_r": "tuning.rank with tuning=lora",
    "lora_rank": "tuning.rank with tuning=lora",
    "lora_alpha": "tuning.alpha with tuning=lora",
    "lora_dropout": "tuning.dropout with tuning=lora",
    "lora_target": "tuning.targets with tuning=lora",
    "lora_target_modules": "tuning.targets with tuning=lora",
    "load_in_4bit": "tuning=qlora",
    "quantization_bit": "tuning=qlora",
    "stage": "objective",
    # data
    "data_path": "dataset.path",
    "dataset_path": "dataset.path",
    "dataset_name": "dataset.name with dataset=hub",
    "datasets": "dataset.sources, or dataset.path",
    "max_length": "dataset.max_length",
    "max_seq_len": "dataset.max_length",
    "max_seq_length": "dataset.max_length",
    "seq_len": "dataset.max_length",
    "sequence_len": "dataset.max_length",
    "cutoff_len": "dataset.max_length",
    "packing": "dataset.packing",
    "sample_packing": "dataset.packing",
    "streaming": "dataset.streaming",
    "chat_template": "template",
    "train_on_inputs": "objective.train_on",
    "train_on_prompt": "objective.train_on",
    "val_size": "eval.fraction",
    "val_set_size": "eval.fraction",
    # the run
    "output_dir": "run.dir and run.name",
    "run_name": "run.name",
    "report_to": "tracker",
    "eval_steps": "eval.every_steps",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep_last",
    "resume_from_checkpoint": "resume=PATH, for another run's; of its own the same command takes the newest",
    # machines
    "deepspeed": "strategy=zero1, zero2 or zero3",
    "fsdp": "strategy=fsdp2",
    "zero_stage": "strategy=zero1, zero2 or zero3",
    "nproc_per_node": "launcher.procs",
    "num_processes": "launcher.procs",
    "num_gpus": "launcher.procs",
    "procs": "launcher.procs",
    "nnodes": "launcher.nodes with launcher=slurm or torchrun",
    "nodes": "launcher.nodes with launcher=slurm or torchrun",
}
"""Ours follows `here it is`."""
