"""torchrun; where a rank ended with exit code 2, which has said what to mend, so does this, without a traceback."""

import logging
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    logging.getLogger("torch.distributed.elastic.multiprocessing.errors.error_handler").disabled = True
    try:
        main()
    except ChildFailedError as failed:
        if failed.get_first_failure()[1].exitcode != 2:
            raise
        sys.exit(2)
