"""DeepSpeed's launcher without the log of what it does: what ranks say is all that is shown.

deepspeed_quietly.py --num_accelerators 1 launcher/train.py --model ...: as `deepspeed` takes them.
"""

import os
import sys

from zo_offload.quiet import quiet_deepspeed

if __name__ == "__main__":
    quiet_deepspeed()
    from deepspeed.launcher import runner

    from zo_offload.process_group import accelerator

    if accelerator().device_name() == "cpu":  # else every process it starts warns of that
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Its one error that is not raised, too, is that a rank has failed, which that rank says.
    runner.main(["--log_level=critical", *sys.argv[1:]])
