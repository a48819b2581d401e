"""Train a QWen model on conversations or texts: all of its weights, LoRA or QLoRA, on one device or many.

    python finetune.py --model_name_or_path FOLDER --data_path DATA --output_dir FOLDER ...
    accelerate launch finetune.py ...

Installed, the same program is called `qwen1-finetune`. Its command line is in `training/commands.py`.
"""

from qwen1_commands import finetune as main

if __name__ == "__main__":
    main()
