-- job, state, code, message, service -> 1, 0 when it was terminal already, -1 when it is unknown
local _, id, state, code, message, service = unpack(ARGV)
go_on_when_full()
local before = redis.call('HGET', job_key(id), 'state')
if not before then return -1 end
if before ~= 'queued' and before ~= 'running' then return 0 end
end_job(id, state, state, {code, message, service})
return 1
