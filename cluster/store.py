"""The store in which the hosts of an elastic run find each other, for a host that does not train: store.py [PORT]."""

import sys
import threading

from torch.distributed import TCPStore

store = TCPStore("0.0.0.0", int(sys.argv[1]) if len(sys.argv) > 1 else 29500, is_master=True, wait_for_workers=False)
print(f"listening on port {store.port}", flush=True)
threading.Event().wait()
