-- SPDX-License-Identifier: Apache-2.0
-- Of twenty requests eighteen are pages, nine of PHP and nine of Python; two have a large answer.
local here = debug.getinfo(1, "S").source:match("@(.*/)")
dofile(here .. "../loads/report.lua")

local kinds = {}
for _ = 1, 9 do
    kinds[#kinds + 1] = "/php/page?kind=page&id="
    kinds[#kinds + 1] = "/app/page?id="
end
kinds[#kinds + 1] = "/php/page?kind=report&id="
kinds[#kinds + 1] = "/app/list?id="

local made = 0
request = function()
    made = made + 1
    -- Neighbours in the sequence are far apart in the databases.
    return wrk.format("GET", kinds[made % #kinds + 1] .. (made * 7919) % 2000 + 1)
end
