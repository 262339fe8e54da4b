-- sha256, keep_ms, whether it is for admitted work (0, 1), and the bytes -> whether it is stored now
local _, sha256, keep_ms, admitted, data = unpack(ARGV)
local key = C.prefix .. 'blob:' .. sha256
if admitted == '1' then go_on_when_full() end
local left_ms = redis.call('PTTL', key)
if left_ms == -2 and not data then return 0 end
if left_ms == -2 then
  redis.call('SET', key, data, 'PX', keep_ms)
elseif left_ms < tonumber(keep_ms) then
  -- Other jobs may need it longer: the expiry is only ever moved on.
  redis.call('PEXPIRE', key, keep_ms)
end
return 1
