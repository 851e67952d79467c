-- SPDX-License-Identifier: Apache-2.0
-- One connection whose ends never wait: each calls recv on a non-blocking socket again and again.
--
--     env SPIN="serve PORT" wrk -s spin.lua http://-                   echoes one connection, then ends
--     env SPIN="drive PORT SIZE SECONDS" wrk -s spin.lua http://-      ping-pong; prints one line of JSON
--
-- Over loopback. wrk does none of the work: it is where there is a LuaJIT, which compiles the loops. An
-- interpreter would be busier than the kernel, and then the socket's lock is mostly free, which is not what
-- programs that spin are like.
local ffi = require("ffi")
local bit = require("bit")
local C = ffi.C

ffi.cdef [[
    struct sockaddr_in { uint16_t family; uint8_t port[2]; uint8_t address[4]; uint8_t zero[8]; };
    struct timespec { long seconds; long nanoseconds; };
    int socket(int domain, int type, int protocol);
    int setsockopt(int fd, int level, int name, const int *value, unsigned int size);
    int bind(int fd, const struct sockaddr_in *address, unsigned int size);
    int listen(int fd, int backlog);
    int accept4(int fd, void *address, void *size, int flags);
    int connect(int fd, const struct sockaddr_in *address, unsigned int size);
    int fcntl(int fd, int command, ...);
    long recv(int fd, void *buffer, size_t size, int flags);
    long send(int fd, const void *buffer, size_t size, int flags);
    int clock_gettime(int clock, struct timespec *now);
]]

local AF_INET, SOCK_STREAM, SOCK_NONBLOCK, F_SETFL, O_NONBLOCK = 2, 1, 2048, 4, 2048
local SOL_SOCKET, SO_REUSEADDR, IPPROTO_TCP, TCP_NODELAY, MSG_NOSIGNAL = 1, 2, 6, 1, 0x4000
local CLOCK_MONOTONIC = 1
local WARM_UP_SECONDS, STALL_SECONDS = 0.2, 5
-- Spinning costs more than looking at a clock: it is looked at once in so many empty reads.
local EMPTY_READS = 65536
-- Latencies are counted in steps of 0.1 us, up to 10 ms.
local STEP, STEPS = 1e-7, 100000

local timespec = ffi.new("struct timespec")
local function clock()
    C.clock_gettime(CLOCK_MONOTONIC, timespec)
    return tonumber(timespec.seconds) + tonumber(timespec.nanoseconds) * 1e-9
end

local function check(result, what)
    if result < 0 then
        error(what .. ": errno " .. ffi.errno())
    end
    return result
end

local function address_of(port)
    local address = ffi.new("struct sockaddr_in", {family = AF_INET, address = {127, 0, 0, 1}})
    address.port[0], address.port[1] = bit.rshift(port, 8), bit.band(port, 255)
    return address, ffi.sizeof(address)
end

local function set(fd, level, name)
    check(C.setsockopt(fd, level, name, ffi.new("int[1]", 1), 4), "setsockopt")
end

-- All of a message; false at the end of the stream.
local function receive(fd, buffer, size)
    local got, empty, deadline = 0, 0, nil
    while got < size do
        local count = tonumber(C.recv(fd, buffer + got, size - got, 0))
        if count > 0 then
            got = got + count
        elseif count == 0 then
            return false
        else
            empty = empty + 1
            if empty % EMPTY_READS == 0 then
                local now = clock()
                deadline = deadline or now + STALL_SECONDS
                if now > deadline then
                    error("nothing to read for " .. STALL_SECONDS .. " s")
                end
            end
        end
    end
    return true
end

local function transmit(fd, buffer, size)
    -- One message is all that is ever under way: there is room for it.
    if tonumber(check(C.send(fd, buffer, size, MSG_NOSIGNAL), "send")) ~= size then
        error("a message was cut")
    end
end

local function serve(port)
    local listener = check(C.socket(AF_INET, SOCK_STREAM, 0), "socket")
    set(listener, SOL_SOCKET, SO_REUSEADDR)
    check(C.bind(listener, address_of(port)), "bind")
    check(C.listen(listener, 1), "listen")
    print("listening")
    io.stdout:flush()
    local fd = check(C.accept4(listener, nil, nil, SOCK_NONBLOCK), "accept")
    set(fd, IPPROTO_TCP, TCP_NODELAY)
    local buffer = ffi.new("uint8_t[?]", 65536)
    -- The first byte says how long a message is.
    if not receive(fd, buffer, 1) then
        return
    end
    local size = buffer[0]
    while receive(fd, buffer, size) do
        transmit(fd, buffer, size)
    end
end

local function percentile(counts, number, part)
    local sum = 0
    for step = 0, STEPS do
        sum = sum + counts[step]
        if sum > number * part then
            return step * STEP * 1e6
        end
    end
end

local function drive(port, size, seconds)
    local fd = check(C.socket(AF_INET, SOCK_STREAM, 0), "socket")
    check(C.connect(fd, address_of(port)), "connect")
    check(C.fcntl(fd, F_SETFL, ffi.cast("int", O_NONBLOCK)), "fcntl")
    set(fd, IPPROTO_TCP, TCP_NODELAY)
    local buffer = ffi.new("uint8_t[?]", 65536)
    local counts = ffi.new("int32_t[?]", STEPS + 1)
    buffer[0] = size
    transmit(fd, buffer, 1)
    local before = clock()
    local warm = before + WARM_UP_SECONDS
    local finish = warm + seconds
    local begin, early, number, longest = nil, 0, 0, 0
    while before < finish do
        transmit(fd, buffer, size)
        if not receive(fd, buffer, size) then
            error("the echo ended")
        end
        local after = clock()
        if begin then
            local took = after - before
            local step = math.min(STEPS, math.floor(took / STEP))
            counts[step] = counts[step] + 1
            number = number + 1
            longest = math.max(longest, took)
        else
            early = early + 1
            if after >= warm then
                begin = after
            end
        end
        before = after
    end
    print(string.format(
        '{"rate":%.3f,"p50_us":%.1f,"p99_us":%.1f,"max_us":%.1f,"requests":%d,"sent_bytes":%.0f}',
        number / (before - begin), percentile(counts, number, 0.5), percentile(counts, number, 0.99),
        longest * 1e6, number + early, 2 * size * (number + early)))
end

local words = {}
for word in (os.getenv("SPIN") or ""):gmatch("%S+") do
    words[#words + 1] = word
end
local numbers = {tonumber(words[2]), tonumber(words[3]), tonumber(words[4])}
if words[1] == "serve" then
    serve(unpack(numbers))
elseif words[1] == "drive" then
    drive(unpack(numbers))
else
    error("SPIN is to be \"serve PORT\" or \"drive PORT SIZE SECONDS\"")
end
-- Before wrk looks for its URL.
os.exit(0)
