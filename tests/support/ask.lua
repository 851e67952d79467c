-- SPDX-License-Identifier: Apache-2.0
-- Asks without end whether a byte is there on file descriptor ASK, and leaves it there; until its parent has
-- gone. wrk is what runs it: it brings LuaJIT, which needs no interpreter's time between two system calls.

local ffi = require("ffi")

ffi.cdef [[
long recv(int fd, void *to, size_t size, int flags);
int getppid(void);
]]

local MSG_PEEK, MSG_DONTWAIT = 0x2, 0x40
local ROUNDS = 100000

local fd, byte, parent = tonumber(os.getenv("ASK")), ffi.new("char[1]"), ffi.C.getppid()

while ffi.C.getppid() == parent do
    for _ = 1, ROUNDS do
        ffi.C.recv(fd, byte, 1, MSG_PEEK + MSG_DONTWAIT)
    end
end
os.exit(0)
