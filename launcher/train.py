"""What a launcher starts on every rank: the same options and code as ``zo-offload train``.

deepspeed --num_accelerators 1 launcher/train.py --model DIR --train FILE --dev FILE ...
"""

from zo_offload.cli import train

if __name__ == "__main__":
    train()
