-- sha256, keep_ms, whether it is for admitted work (0, 1), and the bytes -> whether it is stored now
local _, sha256, keep_ms, admitted, data = unpack(ARGV)
if admitted == '1' then go_on_when_full() end
return keep_blob(sha256, keep_ms, data)
